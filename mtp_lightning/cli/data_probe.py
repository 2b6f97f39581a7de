"""`mtp data probe induction | polynomial`: synthetic tasks to train and test on."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mtp_lightning.console.errors import finish_without_output

app = typer.Typer(no_args_is_help=True, help="Write a synthetic task: documents to train on, problems to test with.")

OutArgument = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="Where to; must not exist yet.", show_default=False)
]
DocumentsOption = Annotated[int, typer.Option(metavar="N", min=1, help="Documents to train on.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of what is drawn.")]


@app.callback()
def describe() -> None:
    """Write a synthetic task: documents to train on, problems to test with."""


@app.command()
def induction(
    out: OutArgument,
    *,
    documents: DocumentsOption = 200_000,
    test: Annotated[int, typer.Option(metavar="N", min=1, help="Stories of the test.")] = 100,
    seed: SeedOption = 0,
) -> None:
    """Write stories whose names are two tokens, with other names in the test, and their tokenizer."""
    from mtp_lightning.console.progress import say
    from mtp_lightning.data.probes.stories import stories, tokenizer_json
    from mtp_lightning.data.probes.write import write_probe

    finish_without_output()
    write_probe(
        out,
        train=(documents, stories(documents, seed, is_test=False)),
        test=(test, stories(test, seed, is_test=True)),
        tokenizer=tokenizer_json(),
    )
    say(f"{documents:,} stories to train on, {test:,} to test with: {out}")


@app.command()
def polynomial(
    out: OutArgument,
    *,
    documents: DocumentsOption = 1_000_000,
    test: Annotated[int, typer.Option(metavar="N", min=1, help="Problems per number of operations.")] = 2000,
    operations: Annotated[
        int,
        typer.Option(metavar="N", min=1, max=20, help="Most operations to train on; tested are up to twice as many."),
    ] = 5,
    pause_tokens: Annotated[
        int, typer.Option(metavar="N", min=0, help="Tokens that say nothing, before the equality sign.")
    ] = 0,
    seed: SeedOption = 0,
) -> None:
    """Write arithmetic on polynomials over F_7 modulo X^5: 1 to 5 operations, in the test 1 to 10."""
    from mtp_lightning.console.progress import say
    from mtp_lightning.data.probes.polynomials import problems
    from mtp_lightning.data.probes.write import write_probe

    num_tested = test * 2 * operations
    drawn = partial(problems, seed=seed, num_pauses=pause_tokens, most_operations=operations)
    finish_without_output()
    write_probe(
        out,
        train=(documents, drawn(documents, is_test=False)),
        test=(num_tested, drawn(test, is_test=True)),
    )
    say(f"{documents:,} problems to train on, {num_tested:,} to test with: {out}")
