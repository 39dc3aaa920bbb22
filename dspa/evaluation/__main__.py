"""lm-eval's own command line, in which the model "dspa" is known; it has no other way to learn of one from the shell:
`python -m dspa.evaluation run --model dspa --model_args pretrained=M,policy=FOLDER ...`"""

import dspa.evaluation  # noqa: F401


def main() -> None:
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
