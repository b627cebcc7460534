"""How the fields of a command become its options: what tyro is told about paths, bounds and chapters."""

from __future__ import annotations

import dataclasses
import inspect
import pathlib
from typing import Annotated, Any

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from ckl_jax import fields
from ckl_jax.runtime import paths

RULES = ConstructorRegistry()
_asked: list[Any] = []


@RULES.primitive_rule
def _path_or_bucket(kind: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    if kind.type == tuple[pathlib.Path, ...]:
        return PrimitiveConstructorSpec(
            nargs="*",
            metavar="[PATH [PATH ...]]",
            instance_from_str=lambda words: tuple(map(paths.parse, words)),
            is_instance=lambda value: isinstance(value, tuple),
            str_from_instance=lambda found: [str(path) for path in found],
        )
    if kind.type is not pathlib.Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: paths.parse(words[0]),
        is_instance=lambda value: isinstance(value, pathlib.PurePath),
        str_from_instance=lambda path: [str(path)],
    )


@RULES.struct_rule
def _dataclass(info: StructTypeInfo) -> StructConstructorSpec | None:
    """A dataclass as tyro reads it, but with bounds in the help, and a group for every chapter of an unnamed field."""
    if not dataclasses.is_dataclass(info.type) or info.type in _asked:
        return None
    _asked.append(info.type)
    found = ConstructorRegistry.get_struct_spec(info)
    _asked.pop()
    assert isinstance(found, StructConstructorSpec)
    in_chapter = fields.Chapter in info.type.__bases__
    divided = {field.name: _parts(field) for field in found.fields}
    shown = [part for field in found.fields for part in divided[field.name] or [_option(field, in_chapter)]]

    def create(**values: Any) -> Any:
        for field in found.fields:
            made = dict[str, Any]()
            for part in divided[field.name]:
                value = values.pop(part.name)
                made |= vars(value) if isinstance(value, fields.Chapter) else {part.name: value}
            if made:
                values[field.name] = type(field.default)(**made)
        return found.instantiate(**values)

    create.__doc__ = info.type.__doc__
    return StructConstructorSpec(create, tuple(shown))


def is_unnamed(kind: Any) -> bool:
    """Whether a field's own name is no part of the options that it holds."""
    return any(getattr(mark, "name", None) == "" for mark in getattr(kind, "__metadata__", ()))


def _parts(field: StructFieldSpec) -> list[StructFieldSpec]:
    """An unnamed field of a config with chapters as one field for each, and those that it has beside them."""
    if not (is_unnamed(field.type) and isinstance(field.default, fields.Chapter)):
        return []
    config_type: Any = type(field.default)
    chapters: list[Any] = [base for base in reversed(config_type.__mro__) if fields.Chapter in base.__bases__]
    parts, beside = list[StructFieldSpec](), dict(fields.kinds(config_type))
    for chapter in chapters:
        defaults = {name: getattr(field.default, name) for name in fields.kinds(chapter)}
        beside = {name: kind for name, kind in beside.items() if name not in defaults}
        title = chapter.__name__ if chapter.__name__.isupper() else chapter.__name__.lower()
        parts.append(StructFieldSpec(title, chapter, chapter(**defaults), inspect.getdoc(chapter)))
    return parts + [StructFieldSpec(name, kind, getattr(field.default, name)) for name, kind in beside.items()]


def _option(field: StructFieldSpec, in_chapter: bool) -> StructFieldSpec:
    """The field with its bounds beside its default, and the lines of its text as one."""

    def text() -> str | None:
        said = field.helptext() if callable(field.helptext) else field.helptext
        return said and " ".join(said.split())

    limits = fields.bound(field.type)
    allowed = "" if limits is None else f"; {limits}"
    shown = tyro.conf.arg(
        prefix_name=False if in_chapter else None,
        help_behavior_hint=lambda default: f"(default: {default or 'none'}{allowed})",
    )
    return dataclasses.replace(field, type=Annotated[field.type, shown], helptext=text)  # type: ignore[arg-type]
