"""Draw images and the classes that a network sees in them, side by side, as a PNG."""

import contextlib
import io

from PIL import Image, ImageDraw, ImageFont

LIMIT = 100  # images of a sheet
COLUMNS, CLASSES = 5, 3  # of a sheet, and lines below an image
WIDTH, HEIGHT, LINE, GAP = 240, 180, 22, 12  # of an image, a line of text and the space around, in pixels
PAPER, FRAME, INK, FAINT, BAR = "white", "#f0f0f0", "#111111", "#666666", "#bcd9ff"
# With the characters of most languages; the first that is installed is taken.
FONTS = ("NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "wqy-microhei.ttc", "DroidSansFallbackFull.ttf", "DejaVuSans.ttf")


def draw(entries):
    """Return the bytes of a PNG file.

    Args:
        entries: list of (path of the image, its title, [(name of a class, probability), ...]), the likeliest class
            first; without classes the image is said to be unreadable.
    """
    columns = min(COLUMNS, len(entries))
    step_x, step_y = WIDTH + GAP, HEIGHT + (1 + CLASSES) * LINE + GAP
    rows = -(-len(entries) // columns)
    sheet = Image.new("RGB", (GAP + columns * step_x, GAP + rows * step_y), PAPER)
    font = _font("".join(title + "".join(name for name, _ in classes) for _, title, classes in entries))
    for number, entry in enumerate(entries):
        _draw_entry(sheet, GAP + number % columns * step_x, GAP + number // columns * step_y, font, *entry)
    data = io.BytesIO()
    sheet.save(data, "PNG")
    return data.getvalue()


def _draw_entry(sheet, left, top, font, path, title, classes):
    pen = ImageDraw.Draw(sheet)
    pen.rectangle((left, top, left + WIDTH - 1, top + HEIGHT - 1), fill=FRAME)
    if classes:
        picture = Image.open(path).convert("RGB")
        scale = min(WIDTH / picture.width, HEIGHT / picture.height)
        picture = picture.resize([max(1, round(scale * side)) for side in picture.size], Image.BICUBIC)
        sheet.paste(picture, (left + (WIDTH - picture.width) // 2, top + (HEIGHT - picture.height) // 2))
    else:
        pen.text((left + GAP, top + HEIGHT // 2), "cannot be read", INK, font)
    top += HEIGHT
    pen.text((left, top + 3), _shorten(title, pen, font, WIDTH, keep_end=True), FAINT, font)
    for name, probability in classes[:CLASSES]:
        top += LINE
        pen.rectangle((left, top + 1, left + round(probability * (WIDTH - 1)), top + LINE - 2), fill=BAR)
        percent = "{:.1f} %".format(100 * probability)
        room = WIDTH - pen.textlength(percent, font)
        pen.text((left + 4, top + 3), _shorten(name, pen, font, room - 12), INK, font)
        pen.text((left + room - 3, top + 3), percent, INK, font)


def _shorten(text, pen, font, width, keep_end=False):
    """Return `text`, cut at the end, or at the beginning, so that it is at most `width` pixels wide."""
    whole = text
    while pen.textlength(text, font) > width:
        whole = whole[1:] if keep_end else whole[:-1]
        text = ".." + whole if keep_end else whole + ".."
    return text


def _font(text):
    """Return a font that has the characters of `text`, if one is installed."""
    size = 14
    for name in FONTS if any(ord(character) > 0xFF for character in text) else FONTS[-1:]:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, size)
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1
        return ImageFont.load_default()
