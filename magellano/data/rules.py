"""Which keys of [data] go together."""

from typing import TYPE_CHECKING

from magellano.names import DataFormat, DataRender

if TYPE_CHECKING:
    from magellano.profile import DataConfig


def fault(data: "DataConfig") -> str | None:
    """What is wrong with the combination, with its remedy; None for nothing."""
    if bool(data.files) + bool(data.hub) + bool(data.sources) != 1:
        return "exactly one of files and hub, or else sources, must be given"
    if wrong := [source.name for source in data.sources if bool(source.files) == bool(source.hub)]:
        return f"sources: {wrong[0]}: exactly one of files and hub must be given"
    if len({source.name for source in data.sources}) < len(data.sources):
        return "sources: two have the same name; rename one"
    formats = [part.format for part in data.parts]
    if DataFormat.PREFERENCE in formats and len(set(formats)) > 1:
        return 'sources: format "preference" goes with no other: make all of them so, or none'
    if data.template and not any(format.is_chat or format is DataFormat.PREFERENCE for format in formats):
        return f'template is for conversations, and format is "{data.format}"; leave it out'
    if data.render is DataRender.TOON and all(format is DataFormat.TEXT for format in formats):
        return 'render "toon" is for prompts, and format "text" has none; leave it out'
    return None


def chats_as_ours(data: "DataConfig") -> bool:
    """Whether all documents are conversations by the template of magellano/data/formats.py."""
    return not data.template and all(part.format.is_chat for part in data.parts)
