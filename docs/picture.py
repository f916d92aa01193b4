"""The picture of docs/concepts: a decoder from text to next token, with the parameters of Llama 3.1 8B, as SVG."""

from __future__ import annotations

from html import escape

from figure import count, describe, dim, layer_millions, share

_INK, _SOFT, _LINE, _FROZEN, _TRAINED = "#1f2933", "#52606d", "#9aa5b1", "#e4ebf3", "#f7c948"
_WIDTH, _HEIGHT = 760, 716
_LEFT, _BOX = 40, 330


def draw_model() -> str:
    """The SVG, with a background of its own, so that it reads on light and dark pages."""
    model = "llama3.1-8b"
    n_layers = describe(model).dimensions.n_layers
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="14">',
        "<title>The parts of Llama 3.1 8B, and where LoRA goes</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 8 4 0 8z" fill="{_LINE}"/></marker></defs>',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" rx="12" fill="#ffffff"/>',
        _text(_LEFT + _BOX / 2, 40, "“The capital of France is”", anchor="middle", weight=600),
        _text(400, 40, "text", color=_SOFT),
        _arrow(_LEFT + _BOX / 2, 48, 68),
        *_box(70, "tokenizer", "ids, no parameters", f"{dim(model, 'vocab')} entries"),
        _arrow(_LEFT + _BOX / 2, 108, 128),
        *_box(
            130,
            "embedding",
            count(model, "embedding"),
            f"{share(model, 'embedding')} · a row of {dim(model, 'hidden')} each",
        ),
        _arrow(_LEFT + _BOX / 2, 168, 208),
        f'<rect x="{_LEFT - 18}" y="190" width="{_WIDTH - 2 * _LEFT + 36}" height="308" rx="10" fill="none" '
        f'stroke="{_LINE}" stroke-dasharray="5 4"/>',
        _text(_WIDTH - _LEFT + 6, 491, f"× {n_layers} layers", anchor="end", color=_SOFT, weight=600),
        *_box(210, "norm", "RMSNorm", ""),
        *_wide_box(
            262, "attention", ("q", "k", "v", "o"), layer_millions(model, "attention"), share(model, "attention")
        ),
        *_box(356, "norm", "RMSNorm", ""),
        *_wide_box(408, "FFN", ("gate", "up", "down"), layer_millions(model, "ffn"), share(model, "ffn")),
        _arrow(_LEFT + _BOX / 2, 248, 260),
        _arrow(_LEFT + _BOX / 2, 318, 354),
        _arrow(_LEFT + _BOX / 2, 394, 406),
        _skip(200, 331),
        _skip(345, 475),
        _arrow(_LEFT + _BOX / 2, 464, 524),
        *_box(526, "norm", "RMSNorm", f"all norms: {count(model, 'norm')} parameters"),
        _arrow(_LEFT + _BOX / 2, 564, 584),
        *_box(586, "head", count(model, "head"), f"{share(model, 'head')} · a matrix of its own here"),
        _arrow(_LEFT + _BOX / 2, 624, 652),
        _text(_LEFT + _BOX / 2, 671, "logits → sampling → “Paris”", anchor="middle", weight=600),
        f'<rect x="{_LEFT}" y="688" width="14" height="14" rx="3" fill="{_TRAINED}"/>',
        _text(_LEFT + 22, 700, "where LoRA goes (all-linear); everything else stays as it is", color=_SOFT, size=13),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _text(
    x: float, y: float, words: str, *, anchor: str = "start", color: str = _INK, weight: int = 400, size: int = 14
) -> str:
    style = f'text-anchor="{anchor}" fill="{color}" font-weight="{weight}" font-size="{size}"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(words)}</text>'


def _arrow(x: float, start: float, end: float) -> str:
    return f'<path d="M{x:g} {start:g}V{end:g}" stroke="{_LINE}" stroke-width="1.5" marker-end="url(#tip)"/>'


def _box(y: float, name: str, inside: str, beside: str) -> list[str]:
    return [
        f'<rect x="{_LEFT}" y="{y}" width="{_BOX}" height="38" rx="6" fill="{_FROZEN}"/>',
        _text(_LEFT + 14, y + 24, name, weight=600),
        _text(_LEFT + _BOX - 14, y + 24, inside, anchor="end"),
        _text(400, y + 24, beside, color=_SOFT),
    ]


def _wide_box(y: float, name: str, matrices: tuple[str, ...], each: str, part: str) -> list[str]:
    """A part with its matrices, each of which LoRA adapts."""
    width = (_BOX - 110) / len(matrices) - 8
    drawn = [f'<rect x="{_LEFT}" y="{y}" width="{_BOX}" height="56" rx="6" fill="{_FROZEN}"/>']
    drawn.append(_text(_LEFT + 14, y + 33, name, weight=600))
    for index, matrix in enumerate(matrices):
        x = _LEFT + 102 + index * (width + 8)
        drawn.append(f'<rect x="{x:g}" y="{y + 10}" width="{width:g}" height="36" rx="5" fill="{_TRAINED}"/>')
        drawn.append(_text(x + width / 2, y + 33, matrix, anchor="middle"))
    drawn.append(_text(400, y + 33, f"{each} a layer, {part} in all", color=_SOFT))
    return drawn


def _skip(start: float, end: float) -> str:
    """The stream past a part, which adds to it."""
    x, out = _LEFT + _BOX / 2, _LEFT - 8
    path = f"M{x:g} {start}H{out}V{end}H{x - 8:g}"
    return f'<path d="{path}" fill="none" stroke="{_LINE}" stroke-width="1.5" marker-end="url(#tip)"/>' + _text(
        x - 26, end - 4, "+", color=_SOFT, weight=600
    )
