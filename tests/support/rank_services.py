"""The rank loop's services without a server, which record the loop's calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from apollo_tp.wire import commands


class RecordingServices:
    """training.rank_loop.Services. ``steps`` are the completed steps with their figures, ``failures`` the weight versions
    after commands that failed, ``hellos`` the commands that asked who the ranks are."""

    def __init__(
        self,
        form_group: Callable[[], None] = lambda: None,
        finish_command: Callable[[int], float] = lambda weight_version: 0.0,
    ) -> None:
        self.form_group, self.finish_command = form_group, finish_command
        self.steps: list[tuple[commands.AnyStep, commands.StepFigures]] = []
        self.failures: list[int] = []
        self.hellos: list[str] = []

    def hello(self, command_id: str = "") -> commands.Hello:
        self.hellos.append(command_id)
        raise NotImplementedError

    def save_checkpoint(self, name: str, kept: Sequence[str] = ()) -> tuple[str, int]:
        raise NotImplementedError(name)

    def keep_snapshot(self, name: str) -> None:
        return None

    def restore_checkpoint(self, name: str, restore_id: str, fallback: str = "") -> str:
        raise NotImplementedError(name)

    is_torn = is_saving = False

    def written_checkpoint(self) -> None:
        return None

    def checkpoint_written(self, path: str) -> None:
        raise NotImplementedError(path)

    def record_step(self, command: commands.AnyStep, figures: commands.StepFigures) -> None:
        self.steps.append((command, figures))

    def record_failure(self, weight_version: int) -> None:
        self.failures.append(weight_version)
