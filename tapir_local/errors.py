"""The one error that a user can put right."""


class TapirError(Exception):
    """What is wrong, where, and what to do about it; printed without a traceback.

    `what` is one sentence, `where` a file, line, key or row, `fix` an instruction to the reader.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what)

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        advice = f"\n  {self.fix}" if self.fix else ""
        return f"{place}{self.what}{advice}"
