"""The student's folder for a run: its own, or a view of it with another chat template."""

from pathlib import Path

from tapir_local.files import atomic_write, remove_path, write_json
from tapir_local.recipe.schema import Recipe
from tapir_local.resources import download_model, find_model_folder, read_chat_template
from tapir_local.run_dir import RunDir


def original(recipe: Recipe, run: RunDir) -> Path:
    """The student's own folder; one from the Hub at the commit that the run noted in run.json when it began."""
    noted = run.record().get("student", {})
    if noted.get("path") == recipe.student.path:
        return download_model(recipe.student.path, noted["revision"], complete=True)
    return find_model_folder(recipe.student.path, recipe.student.revision)


def settle_student(recipe: Recipe, run: RunDir) -> Path:
    """The student's folder for a run that this process holds, settled until the run ends.

    The commit of one from the Hub is noted in run.json. Until round 0 is trained, a view is made again, with the chat
    template as it is now.
    """
    model, named = original(recipe, run), recipe.student.path
    if named != "pocket" and not Path(named).is_dir() and run.record().get("student", {}).get("path") != named:
        write_json(run.path / "run.json", {**run.record(), "student": {"path": named, "revision": model.name}})
    if recipe.student.chat_template is not None and not (run.round(0) / "adapter").is_dir():
        view_with_template(model, read_chat_template(recipe.student.chat_template), view_of(recipe, run))
    return student_folder(recipe, run)


def student_folder(recipe: Recipe, run: RunDir) -> Path:
    """The student as it is trained, exported and compared: its own folder or, with another chat template, a run's view.

    The view is links to the student's files, and the template as it was at the run's first training, so that neither
    a student that others use is changed, nor a run in its midst.
    """
    if recipe.student.chat_template is None:
        return original(recipe, run)
    view = view_of(recipe, run)
    if not view.is_dir():
        view_with_template(original(recipe, run), read_chat_template(recipe.student.chat_template), view)
    return view


def view_of(recipe: Recipe, run: RunDir) -> Path:
    """Where a run's view of its student is."""
    return run.path / "student" / (Path(recipe.student.path).name or "student")


def view_with_template(model: Path, template: str, view: Path) -> None:
    """Make `view` a folder of links to a model's files, with another chat template."""
    remove_path(view)
    with atomic_write(view) as folder:
        folder.mkdir()
        for file in model.iterdir():
            if file.is_file() and file.name != "chat_template.jinja":
                (folder / file.name).symlink_to(file.absolute())
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
