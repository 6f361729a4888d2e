from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from onnx_lwdf.page import html

LAYERS = (("layer", "op"), [("<conv> & co", "Conv")])
TRADEOFF = (("file bytes", "predicted dB", ""), [("100", "5.00", ""), ("300", "9.00", "chosen")])


def parsed(page: str) -> ElementTree.Element:
    """The page as XML, which it is but for the doctype and the meta tag."""
    return ElementTree.fromstring(
        page.removeprefix("<!DOCTYPE html>\n").replace('charset="utf-8">', 'charset="utf-8"/>')
    )


def test_names_stay_text_and_nothing_is_loaded_from_elsewhere() -> None:
    page = html("tool <1>", ["a & b"], LAYERS, TRADEOFF, [(100, 5.0, False), (300, 9.0, True)])
    tree = parsed(page)
    assert [cell.text for cell in tree.iter("td")] == [
        "100",
        "5.00",
        None,
        "300",
        "9.00",
        "chosen",
        "<conv> & co",
        "Conv",
    ]
    assert [text.text for text in tree.iter("p")] == ["a & b"]
    assert not any(word in page for word in ("src=", "href=", "<script", "http"))


def test_the_picture_has_every_point_rising_to_the_right() -> None:
    points = [(100, 5.0, False), (200, 8.0, True), (300, 9.0, False)]
    circles = list(parsed(html("t", [], LAYERS, TRADEOFF, points)).iter("circle"))
    places = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in circles]
    assert [x for x, _ in places] == [50, 320, 590]
    assert [y for _, y in places] == [310, 115, 50]  # three quarters of the way up
    assert [c.findtext("title") for c in circles][1] == "200 bytes, 8.00 dB"
    assert [float(c.attrib["r"]) for c in circles].index(7) == 1


def test_no_picture_without_points_and_one_point_in_the_middle() -> None:
    assert "<svg" not in html("t", [], LAYERS, TRADEOFF, [])
    (circle,) = parsed(html("t", [], LAYERS, TRADEOFF, [(100, 5.0, True)])).iter("circle")
    assert (float(circle.attrib["cx"]), float(circle.attrib["cy"])) == (320, 180)


def test_it_fits_dark_and_narrow_windows() -> None:
    """Colours of the text are the browser's own, the picture shrinks, tables scroll by themselves."""
    page = html("t", [], LAYERS, TRADEOFF, [(100, 5.0, True)])
    (picture,) = parsed(page).iter("svg")
    assert "color-scheme:light dark" in page
    assert picture.attrib["viewBox"] == f"0 0 {picture.attrib['width']} {picture.attrib['height']}"
    assert [child.tag for box in parsed(page).iter("div") for child in box] == ["table", "table"]
