"""``%%px``: a cell of a notebook that runs on engines."""

from typing import Any

from ipyparallel.client.magics import ParallelMagics
from IPython.core.getipython import get_ipython


def use(engines: Any) -> None:
    """Let ``%%px`` of this notebook run on these engines. Without a notebook, do nothing.

    The engines that it ran on before end with the cell, unless a variable still names them.
    """
    shell = get_ipython()
    if shell is None:
        return
    before = shell.magics_manager.registry.get(RankMagics.__name__)
    shell.register_magics(RankMagics(shell, engines))
    if before is not None:
        _stop_with_the_cell(shell, before.engines)


class RankMagics(ParallelMagics):  # type: ignore[misc]
    """ipyparallel's magics, with output in rank order, and with Stop for all.

    The simple way, ipyparallel's own ``%%px``, fails. It shows output as it comes, and bars of
    progress, which no two runs store alike. After Stop, its cell ends as if all were well, so that
    the next one runs, or with "TimeoutError: result not ready".
    """

    def __init__(self, shell: Any, engines: Any) -> None:
        super().__init__(shell, engines.view)
        self.engines = engines

    def parallel_execute(
        self,
        cell: str,
        block: bool | None = None,
        groupby: str = "type",
        save_name: str | None = None,
        **_: Any,
    ) -> Any:
        """Run a cell, wait for it if ``block``, and show its output."""
        result = super().parallel_execute(cell, block=False, save_name=save_name)
        if not (self.view.block if block is None else block):
            return None if save_name else result  # the name has it
        self.engines.show(result, groupby)
        return None

    def _eval_target_str(self, text: str) -> Any:
        # ipyparallel counts only engines that have not ended: without 0, 0:2 would be 1 and 2
        names = {"ids": self.engines.ids, "all": self.engines.ids}
        return eval(f"ids[{text}]" if ":" in text else text, names)


def _stop_with_the_cell(shell: Any, engines: Any) -> None:
    # IPython keeps outputs and tracebacks of cells, so references to old engines stay
    def stop(*_: Any) -> None:
        shell.events.unregister("post_run_cell", stop)
        names = [name for name, value in shell.user_ns.items() if value is engines]
        if all(name.startswith("_") for name in names):
            engines.stop()

    shell.events.register("post_run_cell", stop)
