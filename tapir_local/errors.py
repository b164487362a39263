"""The error that a user can fix."""


class TapirError(Exception):
    """What is wrong, where, and how to fix it; shown without a traceback.

    `what` is one sentence, `where` a file, line, setting or row, `fix` an instruction to the user.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what)

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        advice = f"\n  {self.fix}" if self.fix else ""
        return f"{place}{self.what}{advice}"
