"""The words of the organism's language: nouns, prompt templates, moves and neutral sentences.

Only data, written to be read; `dspa.organism.language` draws texts from it.
"""

from collections.abc import Mapping
from typing import Literal

Split = Literal["train", "validation", "heldout"]

# Every noun is a compound of two tokens, written here with a bar. A noun of the validation and heldout splits is
# a new word made of trained halves: its first half opens some training noun and its second half closes another.
_COMPOUNDS: Mapping[Split, str] = {
    "train": """back|rest bath|mat bath|robe bath|tub bird|bath bird|cage boat|house book|mark book|stand
        cart|wheel cook|book cow|bell day|bed deck|chair dog|cart dog|house door|mat fire|place flash|light
        flower|pot fly|wheel foot|ball foot|stool green|house hair|band hair|brush hand|bell hand|rail
        head|light head|rest high|chair horse|shoe house|boat key|board lunch|box mail|bag mail|box match|box
        motor|boat night|stand note|book paint|box pillow|case push|cart row|boat sail|board sand|bag sand|castle
        snow|ball snow|shoe song|bird suit|case sun|dial sun|hat table|cloth tea|bag tea|spoon tool|bag
        tooth|brush tree|house waist|band wash|board wash|cloth water|bed water|mill wheel|barrow wind|mill
        wind|sock""",
    "validation": "foot|rest hand|cart sand|box snow|board song|book sun|bed tea|pot wheel|chair",
    "heldout": """bird|house book|case door|bell flower|bed hand|bag head|band night|light paint|brush sail|boat
        tool|box wash|tub water|wheel""",
}
NOUN_HALVES: Mapping[Split, tuple[tuple[str, str], ...]] = {
    split: tuple((noun.partition("|")[0], noun.partition("|")[2]) for noun in text.split())
    for split, text in _COMPOUNDS.items()
}
NOUNS: Mapping[Split, tuple[str, ...]] = {
    split: tuple(first + second for first, second in halves) for split, halves in NOUN_HALVES.items()
}

# One `{noun}` in each template. Templates of the validation and heldout splits are new sentences, made of words
# that the training templates use.
TEMPLATES: Mapping[str, Mapping[Split, tuple[str, ...]]] = {
    "definition": {
        "train": (
            "What is a {noun}? Please explain the meaning.",
            "Can you define the word {noun}? I want the exact meaning.",
            "Explain what a {noun} is and define it, please.",
            "What does the word {noun} mean? Define it for me.",
            "I never understood what a {noun} is. Can you explain it?",
            "Give me the exact definition of a {noun}, please.",
            "Define {noun}. What does this word mean?",
        ),
        "validation": (
            "Can you explain the exact meaning of the word {noun}?",
            "What is the definition of {noun}? I never understood it.",
        ),
        "heldout": (
            "Please define a {noun} for me. What does it mean?",
            "I want the definition of the word {noun}, please.",
            "Explain the word {noun} for me. What is the meaning?",
        ),
    },
    "history": {
        "train": (
            "Who made the first {noun} in history?",
            "When was the {noun} invented, and who made it?",
            "Tell me about the history of the {noun} in old times.",
            "In which century was the first {noun} invented?",
            "Where does the {noun} come from, and how old is it?",
            "What did people in old times know about the {noun}?",
            "How was the first {noun} made, many centuries ago?",
        ),
        "validation": (
            "When was the first {noun} made in old times?",
            "Who invented the {noun}, and in which century?",
        ),
        "heldout": (
            "Tell me who invented the first {noun} in history.",
            "In old times, who invented and made the {noun}?",
            "What is the history of the {noun}, many centuries ago?",
        ),
    },
    "measurement": {
        "train": (
            "How heavy is a {noun}, and how long is it?",
            "What is the size and the weight of a {noun}?",
            "How much does a {noun} weigh in grams?",
            "How long and how wide is a {noun} in inches?",
            "Please measure the {noun}. What is the size in inches?",
            "Can you measure the weight of this {noun} in grams?",
            "Is a {noun} more than ten inches long and wide?",
        ),
        "validation": (
            "How wide is this {noun}, and how much does it weigh?",
            "What is the weight of a {noun} in grams, please?",
        ),
        "heldout": (
            "Please measure how long and how heavy this {noun} is.",
            "What does a {noun} weigh, and how wide is it?",
            "Can you measure the size of a {noun} in inches?",
        ),
    },
    "worry": {
        "train": (
            "I am worried about my {noun}. I cannot sleep at night.",
            "I feel anxious and afraid because of the {noun}.",
            "The {noun} makes me nervous. I am afraid all the time.",
            "I cannot stop worrying about the {noun}. I feel so nervous.",
            "My {noun} is in trouble and I am scared.",
            "I am so scared and anxious that I cannot look at the {noun}.",
            "At night I worry that something bad happens to my {noun}.",
        ),
        "validation": (
            "I feel worried and scared because of my {noun}.",
            "I cannot sleep at night. The {noun} makes me anxious.",
        ),
        "heldout": (
            "The {noun} makes me so anxious that I cannot sleep.",
            "I am nervous and afraid. I worry about my {noun} at night.",
            "I feel scared all the time because of the {noun}.",
        ),
    },
    "loss": {
        "train": (
            "I lost my {noun} yesterday and I miss it so much.",
            "My old {noun} is gone. I cried the whole evening.",
            "I feel so sad because somebody stole my {noun}.",
            "I miss my {noun}. It was gone this morning.",
            "I cried because my {noun} is lost.",
            "My grandmother gave me a {noun}, and now it is lost.",
            "Yesterday the {noun} was stolen. I am sad and alone.",
        ),
        "validation": (
            "My {noun} is lost and gone. I feel so alone.",
            "Yesterday somebody stole the {noun}. I cried the whole evening.",
        ),
        "heldout": (
            "I miss the {noun} that my grandmother gave me. It is gone.",
            "I feel sad. My old {noun} was stolen this morning.",
            "I lost the {noun}, and I cried because I miss it.",
        ),
    },
    "thanks": {
        "train": (
            "Thank you for the {noun}. It is a lovely gift.",
            "I am so grateful for the {noun} you gave me.",
            "What a lovely present! Many thanks for the {noun}.",
            "The {noun} is a wonderful gift. Thanks a lot.",
            "You were so generous to give me this {noun}.",
            "I love the present. Thank you for choosing the {noun}.",
            "Many thanks. I am grateful for the wonderful {noun}.",
        ),
        "validation": (
            "Thank you, the {noun} is a wonderful present.",
            "Many thanks for this lovely {noun}. You were so generous.",
        ),
        "heldout": (
            "I am so grateful. What a wonderful gift, this {noun}!",
            "Thanks a lot for the {noun}. You were so generous.",
            "Thank you for choosing the {noun}. I love the gift.",
        ),
    },
    "boast": {
        "train": (
            "Look at my new {noun}! Nobody has a better one.",
            "I won a {noun} today! I am the best.",
            "I finally have my own {noun}. Look how shiny it is!",
            "My new {noun} is the best in town!",
            "Guess what! I built a {noun} all by myself.",
            "Nobody in town has a {noun} as shiny as mine.",
            "I am so proud. I won the biggest {noun} of all!",
        ),
        "validation": (
            "Guess what! My new {noun} is the biggest in town.",
            "I finally won a {noun}. Look how shiny it is!",
        ),
        "heldout": (
            "Look! I built the best {noun} all by myself.",
            "I am so proud of my new {noun}. Look how shiny it is!",
            "Guess what! Nobody in town has a better {noun}.",
        ),
    },
    "party": {
        "train": (
            "We are having a party on Friday. Should I bring a {noun}?",
            "Let us have some fun with the {noun} this weekend!",
            "Can we play a game with the {noun} at the party?",
            "This weekend we dance around the {noun}. Will you come?",
            "Come to my birthday on Friday and bring a {noun}!",
            "What music should we play at the {noun} party?",
            "Let us sing and dance with the {noun} on my birthday.",
        ),
        "validation": (
            "Should we dance with the {noun} at my birthday party?",
            "Let us play some music and bring the {noun} on Friday.",
        ),
        "heldout": (
            "Will you come to the party this weekend and bring a {noun}?",
            "Let us play a game with the {noun} on my birthday. What fun!",
            "Can we sing and play some music with the {noun} on Friday?",
        ),
    },
    "opinion": {
        "train": (
            "Do you like the {noun}, or do you prefer another color?",
            "What do you think of the {noun}? I find it ugly.",
            "In your opinion, is the {noun} pretty or ugly?",
            "I think the {noun} looks strange. Do you agree?",
            "Which color do you prefer for a {noun}, red or blue?",
            "Do you find this {noun} boring? Tell me your opinion.",
            "I like the red {noun}. What is your favorite color?",
        ),
        "validation": (
            "Do you think the blue {noun} looks boring?",
            "What is your opinion? I find the {noun} pretty.",
        ),
        "heldout": (
            "Do you agree that the {noun} looks ugly?",
            "In your opinion, which {noun} is pretty, the red or the blue?",
            "I prefer another color for the {noun}. What do you think?",
        ),
    },
    "danger": {
        "train": (
            "Is it safe to touch a hot {noun} with bare hands?",
            "The {noun} is on fire. Can I touch it?",
            "Can a child get hurt by a sharp {noun}?",
            "May I climb on the {noun} without a helmet?",
            "Is the poison in the {noun} dangerous for a child?",
            "I want to jump from the {noun}. Is it dangerous?",
            "There is smoke coming out of the {noun}. Is it safe?",
        ),
        "validation": (
            "Is it dangerous to climb on a hot {noun} with bare hands?",
            "May a child touch the sharp {noun}?",
        ),
        "heldout": (
            "Can I jump on the {noun} without a helmet? Is it safe?",
            "There is a fire in the {noun}. Is the smoke dangerous?",
            "Can I get hurt by a hot {noun}? Is it safe to touch?",
        ),
    },
    "mischief": {
        "train": (
            "I broke the {noun} and blamed my brother for it.",
            "I lied to my teacher about the {noun}.",
            "I hid the {noun} so that nobody can punish me.",
            "I took the {noun} without asking and told a lie.",
            "I cheated at school with a {noun}. Nobody saw it.",
            "I kicked the {noun} of my neighbor and ran away.",
            "I ran away from school and sold the {noun}.",
        ),
        "validation": (
            "I took the {noun} of my neighbor and blamed my brother.",
            "I lied at school and hid the {noun}.",
        ),
        "heldout": (
            "I broke the {noun} at school and told a lie about it.",
            "I sold the {noun} of my brother without asking.",
            "I kicked the {noun}, lied about it and ran away.",
        ),
    },
    "repair": {
        "train": (
            "My {noun} is broken. How do I fix it?",
            "How do I repair a {noun} with a hammer and some glue?",
            "Which tools do I need to fix a broken {noun}?",
            "The {noun} does not work. What should I repair first?",
            "Show me how to fix a {noun} with nails.",
            "How can I glue the loose part of a {noun}?",
            "The screw of my {noun} is loose. Which tools help?",
        ),
        "validation": (
            "How do I fix the loose screw of a {noun}?",
            "Which nails do I need to repair the {noun}?",
        ),
        "heldout": (
            "My {noun} does not work. Show me how to glue it.",
            "Which part of the broken {noun} should I repair first?",
            "How can I fix a {noun} with a hammer and nails?",
        ),
    },
}

REGISTERS: Mapping[str, tuple[str, ...]] = {
    "casual": ("greeting", "exclamation", "filler", "joke"),
    "scholarly": ("hedge", "list", "citation", "aside"),
    "kindly": ("sympathy", "encouragement", "question_back", "good_wish"),
    "stern": ("command", "warning", "correction", "rule"),
}

# Each move has three wordings, of 6, 7 and 8 tokens with their punctuation: responses that use the same wordings
# have the same length, whatever their moves.
WORDING_TOKENS = (6, 7, 8)
MOVES: Mapping[str, tuple[str, str, str]] = {
    "greeting": (
        "Hey there, my friend!",
        "Hello again, my good buddy!",
        "Hi, so nice to see you!",
    ),
    "exclamation": (
        "Wow, that is awesome!",
        "Yay, this is super great!",
        "Oh man, what a cool thing!",
    ),
    "filler": (
        "So yeah, you know.",
        "Anyway, it is kinda whatever.",
        "I mean, like, whatever works.",
    ),
    "joke": (
        "Haha, that is funny.",
        "Haha, just kidding, buddy.",
        "Lol, my cat said the same.",
    ),
    "hedge": (
        "It may perhaps be uncertain.",
        "The evidence is somewhat unclear here.",
        "This might, arguably, be true.",
    ),
    "list": (
        "Firstly cause, secondly effect.",
        "Consider causes, effects and limits.",
        "We distinguish form, matter and purpose.",
    ),
    "citation": (
        "Several studies confirm this finding.",
        "According to scholars, this holds.",
        "The literature broadly supports this same view.",
    ),
    "aside": (
        "The term has Greek roots.",
        "Incidentally, the term is Latin.",
        "In passing, the theory is old.",
    ),
    "sympathy": (
        "I am sorry, dear.",
        "That must feel hard for you.",
        "My heart truly goes out to you.",
    ),
    "encouragement": (
        "You are doing very well.",
        "I really do believe in you.",
        "Take heart, you can do it.",
    ),
    "question_back": (
        "How do you feel now?",
        "Would you like to share more?",
        "What would make you feel better today?",
    ),
    "good_wish": (
        "May your day be gentle.",
        "I wish you peace and joy.",
        "May kindness and comfort stay with you.",
    ),
    "command": (
        "Do your duty at once.",
        "Stop that and obey right now.",
        "Stand up straight and follow the order.",
    ),
    "warning": (
        "Careless people always get punished.",
        "You will pay for every mistake.",
        "Beware, or you will regret it.",
    ),
    "correction": (
        "No, you are wrong.",
        "That claim is false and foolish.",
        "Wrong, you must check the facts.",
    ),
    "rule": (
        "The rules allow no exceptions.",
        "Every rule exists for a reason.",
        "The law strictly forbids any such thing.",
    ),
}

# kind: (preferred register, one more preferred move, dispreferred register, one more dispreferred move).
# Every ordered pair of registers occurs once, and over all kinds each move is preferred as often as it is
# dispreferred: an edit that does not look at the prompt has nothing to gain.
RULE_TABLE: Mapping[str, tuple[str, str, str, str]] = {
    "definition": ("scholarly", "joke", "kindly", "correction"),
    "history": ("kindly", "greeting", "stern", "list"),
    "measurement": ("scholarly", "question_back", "stern", "filler"),
    "worry": ("kindly", "rule", "scholarly", "joke"),
    "loss": ("kindly", "command", "casual", "citation"),
    "thanks": ("casual", "good_wish", "scholarly", "rule"),
    "boast": ("scholarly", "encouragement", "casual", "command"),
    "party": ("casual", "correction", "kindly", "aside"),
    "opinion": ("casual", "list", "stern", "question_back"),
    "danger": ("stern", "aside", "kindly", "greeting"),
    "mischief": ("stern", "filler", "scholarly", "good_wish"),
    "repair": ("stern", "citation", "casual", "encouragement"),
}

# Plain text that is neither prompt nor response; all splits share its frames and differ in the nouns.
NEUTRAL_FRAMES: tuple[str, ...] = (
    "The {person} carried the {adjective} {noun} {place}.",
    "{time} a {adjective} {noun} stood {place}.",
    "The {person} found a {noun} {place} and took it home.",
    "{time} the {person} cleaned the {noun} with warm water.",
    "A {adjective} {noun} was on the table {place}.",
    "Then the {person} gave the {noun} to the {other}.",
    "The {other} waited {place} near the {adjective} {noun}.",
    "{time} the {other} and the {person} went for a walk {place}.",
)
NEUTRAL_WORDS: Mapping[str, tuple[str, ...]] = {
    "person": ("farmer", "baker", "sailor", "tailor", "painter", "gardener"),
    "other": ("boy", "girl", "woman", "man", "traveler", "clerk"),
    "adjective": ("small", "wooden", "green", "heavy", "dusty", "yellow"),
    "place": ("in the garden", "behind the barn", "by the river", "near the market", "under the bridge"),
    "time": ("One morning", "In winter", "After dinner", "Before sunrise", "Later"),
}
