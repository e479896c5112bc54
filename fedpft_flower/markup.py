"""Build HTML and SVG whose texts cannot become elements."""

import html


class Markup(str):
    """Hold text that is markup already; any other text is escaped."""

    __slots__ = ()


def element(
    tag: str, /, *children: object, **attributes: str | float | bool | None
) -> Markup:
    """Return an element around children; what is not `Markup` is escaped.

    Args:
        tag: the name of the element.
        children: elements and texts.
        attributes: by name, `_` standing for `-` and one at the end for nothing
            (`class_`); None leaves an attribute out, True writes its bare name.
    """
    written = "".join(
        f" {_attribute(key)}" + ("" if value is True else f'="{escape(value)}"')
        for key, value in attributes.items()
        if value is not None
    )
    if tag in _VOID:
        return Markup(f"<{tag}{written}>")
    return Markup(f"<{tag}{written}>{join(children)}</{tag}>")


def join(children: object) -> Markup:
    """Return children, alone or in a sequence, one behind the other."""
    if isinstance(children, list | tuple):
        return Markup("".join(map(join, children)))
    return children if isinstance(children, Markup) else escape(children)


def escape(value: object) -> Markup:
    """Return a value as text that no browser takes for markup.

    What is not printable (control characters, changes of direction) shows its code, so
    that a name cannot pass itself off as another.
    """
    text = str(value)
    plain = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    return Markup(html.escape(plain))


# Elements without an end.
_VOID = {"meta", "br"}


def _attribute(key: str) -> str:
    # SVG has one attribute with capitals in what we write.
    name = key.removesuffix("_").replace("_", "-")
    return {"viewbox": "viewBox", "preserveaspectratio": "preserveAspectRatio"}.get(
        name, name
    )
