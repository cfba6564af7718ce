"""The `workbench` command: the commands of `workbench.commands`, in the order in which the help lists them.

Nothing heavy is imported before a command runs, so that `workbench --help` answers at once.
"""

import typer

from workbench.commands import (
    ask,
    checkpoints,
    combine,
    convert,
    evaluate,
    find,
    learn,
    measure,
    page,
    patch,
    probe,
    record,
    steer,
)

COMMANDS = {
    "Record": (record.trace, convert.import_, checkpoints.models),
    "Ask": (ask.info, ask.validate, ask.analyze, probe.probe, ask.report, ask.export, ask.query, page.app),
    "Combine": (combine.merge, combine.split, combine.sample),
    "Steer": (
        find.find,
        steer.generate,
        evaluate.evaluate,
        patch.patch,
        learn.rewire,
        learn.remix,
    ),
    "Serve": (checkpoints.place, checkpoints.prune, checkpoints.merge_experts),
    "Measure": (measure.bench,),
}

app = typer.Typer(
    name="workbench",
    help="Record, query and explain the routing of mixture-of-experts language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for panel, commands in COMMANDS.items():
    for command in commands:
        # `import` is no name for a Python function
        app.command(command.__name__.rstrip("_").replace("_", "-"), rich_help_panel=panel)(command)
