"""Settings that had another name in earlier versions: recipes, runs and --set may still use the old one."""

from collections.abc import Mapping

OLD_NAMES: Mapping[str, str] = {
    "card.licence": "card.license",
    "card.base_licence": "card.base_license",
    "card.data_licence": "card.data_license",
    "student.parallel": "student.concurrency",
}


def current_path(path: str) -> str:
    """The present path of a setting."""
    return OLD_NAMES.get(path, path)
