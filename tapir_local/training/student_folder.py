"""The student's model folder for a run: its own folder, or a view of it with another chat template."""

from pathlib import Path

from tapir_local.files import atomic_write, remove_path, write_json
from tapir_local.recipe.schema import Recipe
from tapir_local.resources import download_model, find_model_folder, read_chat_template
from tapir_local.run_dir import RunDir


def original_folder(recipe: Recipe, run: RunDir) -> Path:
    """The student's own folder; for one from the Hub, at the commit recorded in run.json when the run started."""
    noted = run.record().get("student", {})
    if noted.get("path") == recipe.student.path:
        return download_model(recipe.student.path, noted["revision"], complete=True)
    return find_model_folder(recipe.student.path, recipe.student.revision)


def prepare_student_folder(recipe: Recipe, run: RunDir) -> Path:
    """Fix the student's folder for the run. The calling process must hold the run's lock.

    The commit of a Hub model is recorded in run.json. Until round 0 is trained, a view is made again with the current
    chat template.
    """
    model, named = original_folder(recipe, run), recipe.student.path
    if named != "pocket" and not Path(named).is_dir() and run.record().get("student", {}).get("path") != named:
        write_json(run.path / "run.json", {**run.record(), "student": {"path": named, "revision": model.name}})
    if recipe.student.chat_template is not None and not (run.round(0) / "adapter").is_dir():
        make_template_view(model, read_chat_template(recipe.student.chat_template), student_view_path(recipe, run))
    return student_folder(recipe, run)


def student_folder(recipe: Recipe, run: RunDir) -> Path:
    """The folder that is trained, exported and compared: the student's own or, with another chat template, the run's
    view.

    The view consists of links to the student's files and the template as it was at the run's first training. So neither
    a student that other runs use nor a run in progress is changed.
    """
    if recipe.student.chat_template is None:
        return original_folder(recipe, run)
    view = student_view_path(recipe, run)
    if not view.is_dir():
        make_template_view(original_folder(recipe, run), read_chat_template(recipe.student.chat_template), view)
    return view


def student_view_path(recipe: Recipe, run: RunDir) -> Path:
    """Path of a run's view of its student."""
    return run.path / "student" / (Path(recipe.student.path).name or "student")


def make_template_view(model: Path, template: str, view: Path) -> None:
    """Make `view` a folder of links to a model's files, with another chat template."""
    remove_path(view)
    with atomic_write(view) as folder:
        folder.mkdir()
        for file in model.iterdir():
            if file.is_file() and file.name != "chat_template.jinja":
                (folder / file.name).symlink_to(file.absolute())
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
