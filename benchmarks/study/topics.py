"""What the prompts of the study are about: per kind, topics and templates of each split.

No topic and no template of a split occurs in another, so that held-out prompts are new in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from study.settings import Split


@dataclass(frozen=True)
class Material:
    """Topics, separated by semicolons, and templates with a `{}` for the topic."""

    topics: Mapping[Split, str]
    templates: Mapping[Split, tuple[str, ...]]

    def topics_of(self, split: Split) -> list[str]:
        return [topic.strip() for topic in self.topics[split].split(";")]


MATERIAL: Mapping[str, Material] = {
    "how-to": Material(
        topics={
            "train": """grow tomatoes; bake bread; change a bicycle tyre; clean a cast iron pan; paint a bedroom wall;
                write a cover letter; train a puppy; make iced coffee; fold a fitted sheet; unclog a sink;
                pack a suitcase; plant an apple tree; sharpen a kitchen knife; remove a wine stain;
                plan a birthday party; cook brown rice; set up a tent; start a vegetable garden; descale a kettle;
                wash a wool sweater; learn to juggle; organise a bookshelf; prepare for a job interview;
                make a paper plane""",
            "validation": """iron a shirt; build a campfire; brew green tea; repot a cactus; wrap a present;
                jump-start a car""",
            "heldout": """make pancakes; fix a leaky tap; knit a scarf; polish leather shoes; keep bees;
                hang a picture; start a podcast; poach an egg; prune a rose bush; tie a tie; make a budget;
                teach a child to swim; clean a window; compost kitchen scraps; ripen an avocado; plan a road trip;
                make candles; mow a lawn; store winter clothes; write a thank-you note""",
        },
        templates={
            "train": (
                "How do I {}?",
                "What are the steps to {}?",
                "I want to {}. Where do I begin?",
                "Explain how to {}.",
                "Show me how to {}.",
                "Please walk me through how to {}.",
            ),
            "validation": ("Could you tell me how to {}?", "What should I do to {}?", "Teach me to {}."),
            "heldout": (
                "What is the best way to {}?",
                "How can a beginner {}?",
                "I have never tried to {}. What do I do?",
                "Give me instructions to {}.",
                "I need to {} this weekend. How does one do that?",
            ),
        },
    ),
    "opinion": Material(
        topics={
            "train": """working from home; school uniforms; social media; electric cars; eating meat;
                reality television; learning Latin; tipping in restaurants; video games; keeping a diary;
                daylight saving time; modern art; buying a house; zoos; online dating; space travel; fast fashion;
                private schools; nuclear power; reading on a screen; beauty contests; long commutes; cash;
                pop music""",
            "validation": """homework; cruise ships; tattoos; early retirement; self-driving cars; shopping malls""",
            "heldout": """air travel; boxing; electronic books; four-day weeks; gap years; horror films;
                instant coffee; living abroad; mobile phones in class; national lotteries; open-plan offices;
                pet insurance; plastic surgery; public libraries; robots at home; smart watches; standing desks;
                vegan food; wind farms; wild camping""",
        },
        templates={
            "train": (
                "What do you think about {}?",
                "Do you like {}?",
                "What is your opinion on {}?",
                "Is there a good case for {}?",
                "Tell me your view of {}.",
                "How do you feel about {}?",
            ),
            "validation": ("Are you in favour of {}?", "Would you say {} is overrated?", "Your thoughts on {}?"),
            "heldout": (
                "Where do you stand on {}?",
                "Should people care about {}?",
                "Would you defend {}?",
                "Some people dislike {}. Do you agree with them?",
                "In your opinion, does {} make life better?",
            ),
        },
    ),
    "fact": Material(
        topics={
            "train": """the moon; glaciers; the human heart; photosynthesis; gravity; the Roman Empire; honey;
                volcanoes; penicillin; the Nile; lightning; the printing press; whales; steel; the equator; vitamin C;
                earthquakes; the French Revolution; electricity; coral reefs; the liver; bronze; tides;
                the compass""",
            "validation": """rainbows; the telescope; salt; owls; the Sahara; concrete""",
            "heldout": """atoms; bats; the brain; carbon dioxide; comets; copper; deserts; the Great Wall of China;
                insulin; Jupiter; magnets; mushrooms; oxygen; paper; the Renaissance; rubber; the steam engine;
                spiders; the Amazon; vaccines""",
        },
        templates={
            "train": (
                "What is known about {}?",
                "Give me a fact about {}.",
                "Describe {}.",
                "Why is {} important?",
                "What should everyone know about {}?",
                "Define the term: {}.",
            ),
            "validation": ("What does one mean by {}?", "Summarise what science says about {}.", "What about {}?"),
            "heldout": (
                "What can you tell me about {}?",
                "In plain words, what is meant by {}?",
                "State the key facts about {}.",
                "My teacher asked about {}. What is the answer?",
                "What makes {} special?",
            ),
        },
    ),
    "feeling": Material(
        topics={
            "train": """my dog died; I failed my driving test; my best friend moved away; I lost my job;
                nobody came to my party; I had a fight with my sister; my exam is tomorrow; my grandmother is ill;
                I was left out at work; I broke my favourite cup; my team lost the final;
                I forgot my wedding anniversary; I did not get the promotion; my flat was burgled;
                I am far away from home; I said something stupid; my boyfriend left me; I have to give a speech;
                my garden was flooded; my novel was rejected; I missed the last train; my son left for college;
                I got a bad grade; my neighbour shouted at me""",
            "validation": """my cat ran away; I burnt the dinner; my visa was refused; I crashed the car;
                my roommate ignores me; I lost my wallet""",
            "heldout": """my father is in hospital; I spilled coffee on my laptop; my flight was cancelled;
                I was not invited to the wedding; my favourite shop closed; I cannot find a job; my phone was stolen;
                I embarrassed myself in class; my brother does not call me; I lost a bet; my marriage is over;
                I start a new school on Monday; my hamster died; I was told off by my boss;
                I hurt my knee before the race; my painting was ruined; I slept through my alarm;
                my landlord raised the rent; I failed the audition; my friends forgot my birthday""",
        },
        templates={
            "train": (
                "I feel awful: {}.",
                "I can't stop thinking about it: {}.",
                "It has been a hard day, because {}.",
                "I am so sad. You see, {}.",
                "I am upset since {}.",
                "I could cry: {}.",
            ),
            "validation": ("I feel so down: {}.", "It hurts that {}.", "I'm a wreck, because {}."),
            "heldout": (
                "I am really struggling: {}.",
                "I don't know what to do with myself: {}.",
                "I am not fine today, {}.",
                "Everything feels heavy now that {}.",
                "Can we talk? The thing is, {}.",
            ),
        },
    ),
    "story": Material(
        topics={
            "train": """a lighthouse keeper; a lost robot; a dragon who is afraid of fire; two sisters in a storm;
                a clock that runs backwards; a baker at night; a boy who finds a map; an old sailor; a talking fox;
                a queen without a crown; a train to nowhere; a witch and her cat; the last tree in the city;
                a thief with a conscience; a girl who speaks to birds; a haunted piano; an astronaut who is homesick;
                a village under water; a snowman in spring; a forgotten letter; a knight who lost his horse;
                a painter without colours; a wolf and a shepherd; the mayor of a tiny town""",
            "validation": """a shy ghost; a stolen violin; a bridge troll; a rainy harbour; a clumsy wizard;
                a lonely giant""",
            "heldout": """a mouse in a library; a doctor on an island; the keeper of a secret garden;
                a pirate who hates water; twins who swap places; a broken mirror; a donkey who wants to fly;
                a miner and a diamond; a child on the moon; an inventor and her machine; a postman in winter;
                the prince of frogs; a magician's apprentice; a desert caravan; a singing river;
                a detective and a cake; an owl at school; a tailor and a king; a ship in a bottle;
                a farmer and a meteor""",
        },
        templates={
            "train": (
                "Write a short story about {}.",
                "Tell me a tale about {}.",
                "Make up a story in which we meet {}.",
                "Begin a novel with {}.",
                "Tell a bedtime story about {}.",
                "Write the opening scene of a film about {}.",
            ),
            "validation": ("I want to hear a story about {}.", "Invent a legend about {}.", "Write a fable about {}."),
            "heldout": (
                "Write a few sentences of fiction about {}.",
                "Entertain me with a story about {}.",
                "Once there was {}. Go on.",
                "Imagine {} and tell me what happened.",
                "My daughter wants a story about {}.",
            ),
        },
    ),
    "coding": Material(
        topics={
            "train": """reverses a string; sorts a list of numbers; counts the words in a text;
                finds the largest number; checks for a prime number; adds two numbers; removes duplicates from a list;
                reads a file; computes a factorial; converts Celsius to Fahrenheit; finds the vowels in a word;
                merges two dictionaries; draws a random number; tests whether a year is a leap year;
                prints a triangle of stars; sums the digits of a number; splits a sentence into words;
                counts down from ten; computes an average; swaps two variables; squares every number in a list;
                finds a substring; capitalises a name; prints the even numbers""",
            "validation": """finds a palindrome; rounds a price; flattens a list; computes a power;
                lists the files in a folder; counts the letters in a word""",
            "heldout": """finds the smallest number; multiplies a list of numbers; converts miles to kilometres;
                checks for an even number; prints the Fibonacci numbers; reverses a list;
                computes the area of a circle; finds the longest word; generates a password;
                counts the lines of a file; says hello to a user; computes the median; replaces spaces by dashes;
                tests whether a list is empty; adds tax to a price; prints the days of the week;
                finds common items of two lists; turns a string into an integer; computes compound interest;
                rolls two dice""",
        },
        templates={
            "train": (
                "Write a Python function that {}.",
                "I need a Python script that {}.",
                "Show me Python code that {}.",
                "Code a small program that {}.",
                "In Python, what {}?",
                "Help me with a Python program that {}.",
            ),
            "validation": ("Give me a Python snippet that {}.", "Which Python code {}?", "Program something that {}."),
            "heldout": (
                "Please write code in Python that {}.",
                "I am learning Python. I want a function that {}.",
                "What would a Python function look like that {}?",
                "Make a Python program that {}.",
                "My homework: a Python function that {}.",
            ),
        },
    ),
}
