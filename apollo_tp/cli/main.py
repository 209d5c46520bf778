"""``apollo-tp``: the coordinator from a shell, through HTTP calls that any other client could make."""

from __future__ import annotations

import io
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from apollo_tp import __version__
from apollo_tp.cli import job_commands, push, trainer_commands
from apollo_tp.cli.session import USAGE, command, say

HELP = """The coordinator from a shell.

Exit status: 0 done; 1 the request was refused or the job failed; 2 wrong usage; 3 no coordinator answers.
"""


class Commands(TyperGroup):
    """A command group whose error for an unknown command lists the known ones."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Resolve a command as typer does."""
        names = self.list_commands(ctx)
        if not ctx.resilient_parsing and args[0] not in names and not args[0].startswith("-"):
            ctx.fail(f"invalid choice: {args[0]!r} (choose from {', '.join(names)})")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=Commands, help=HELP, rich_markup_mode=None, pretty_exceptions_enable=False, invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


@app.callback(help=HELP)
def _alone(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Without a command: the version, or the help."""
    if version:
        print(f"apollo-tp {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


for function in (
    trainer_commands.status, job_commands.train, job_commands.jobs, job_commands.job, job_commands.events,
    job_commands.action("cancel"), job_commands.action("pause"), job_commands.action("resume"), job_commands.score,
    trainer_commands.checkpoint, trainer_commands.checkpoints, trainer_commands.restore, push.push, trainer_commands.inspect,
    trainer_commands.compare, trainer_commands.plan, trainer_commands.keys, trainer_commands.end_orphans,
):  # fmt: skip
    app.command(function.__name__.replace("_", "-"))(command(function))
app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    trainer_commands.serve
)


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``apollo-tp``; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a character that the terminal lacks is shown as its number
    arguments = list(sys.argv[1:] if argv is None else argv)
    overrides = []
    if arguments[:1] == ["serve"] and "--" in arguments:  # click would drop the dashes
        place = arguments.index("--")
        arguments, overrides = arguments[:place], arguments[place + 1 :]
    try:
        typer.main.get_command(app).main(args=arguments, prog_name="apollo-tp", obj=overrides)
    except SystemExit as ended:
        return int(ended.code or 0)
    except OSError as error:  # a help text that cannot be written, for example
        return say(error, USAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
