"""`python -m mtp_lightning`, the same as `mtp`."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C and other signals end it in one word, also while it is still being loaded."""
    from mtp_lightning.launch.ending import Ending, code_and_words

    ending = Ending()
    ending.begin()
    code: object = 0
    try:
        from mtp_lightning.cli.app import main as run

        run()
    except KeyboardInterrupt as interrupt:
        code, words = code_and_words(interrupt)
        print(words, file=sys.stderr)
    except SystemExit as end:
        code = end.code
    sys.exit(ending.finish(code))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
