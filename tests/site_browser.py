"""The built site in a browser: what a page does on a desktop and a phone, in light and dark.

    pip install playwright && playwright install chromium
    .ci/docs && python tests/site_browser.py
    python tests/site_browser.py --chromium /usr/bin/chromium --shots out/shots

A row for each page and setting that has a fault; the exit code is their number, at most 1.
A fault: the page is wider than the window; an element other than a scroll box is wider than its
place; text of a contrast below 4.5 (WCAG 2.1); a picture that did not load; a stretch over two
screens without a figure, a table or code; a message on the console; a request that leaves the
site. Part of the list for a release, not of the gate.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import pathlib
import threading

from playwright.sync_api import Page, sync_playwright

HEIGHT = 800
SCREENS = 2  # without a figure, a table or code, at a desktop's width
PROBE = """
(most) => {
  const faults = [], seen = new Set();
  const say = (text) => seen.has(text) || (seen.add(text), faults.push(text));
  const root = document.documentElement, article = document.querySelector("article");
  if (root.scrollWidth > innerWidth) say(`page ${root.scrollWidth} px wide`);
  for (const e of article.querySelectorAll("*")) {
    const { display, overflowX } = getComputedStyle(e);
    const scrolls = ["auto", "scroll"].includes(overflowX) || display === "inline";
    if (!scrolls && e.clientWidth && e.scrollWidth > e.clientWidth + 4)
      say(`${e.tagName.toLowerCase()} ${e.scrollWidth} > ${e.clientWidth} px`);
  }
  for (const image of document.images)
    if (!image.complete || !image.naturalWidth) say(`not loaded: ${image.src}`);

  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const colour = (style) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = style;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, under) => under.map((v, i) => top[i] * top[3] + v * (1 - top[3]));
  const ancestors = (e) => (e ? [...ancestors(e.parentElement), e] : []);
  const part = (v) => (v / 255 <= 0.04045 ? v / 3294.6 : ((v / 255 + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const e = texts.currentNode.parentElement, style = getComputedStyle(e);
    const all = ancestors(e), box = e.getBoundingClientRect();
    const opacity = all.reduce((o, a) => o * getComputedStyle(a).opacity, 1);
    const words = texts.currentNode.textContent.trim();
    if (!words || e.closest("script, style, noscript, template")) continue;
    if (!box.width || !opacity || style.visibility === "hidden") continue;
    const back = all.reduce(
      (under, a) => over(colour(getComputedStyle(a).backgroundColor), under), [255, 255, 255]);
    const [r, g, b, a] = colour(style.color);
    const [x, y] = [light(over([r, g, b, a * opacity], back)), light(back)].sort((p, q) => p - q);
    const ratio = (y + 0.05) / (x + 0.05);
    if (ratio < 4.5) say(`contrast ${ratio.toFixed(2)} of "${words.slice(0, 20)}"`);
  }

  const blocks = [...article.querySelectorAll("table, pre, figure, img")];
  const places = blocks.map((e) => e.getBoundingClientRect()).filter((r) => r.height);
  const end = article.getBoundingClientRect();
  let from = end.top;
  for (const { top, bottom } of [...places, { top: end.bottom, bottom: end.bottom }]) {
    if (most && top - from > most) say(`${Math.round(top - from)} px of text alone`);
    from = Math.max(from, bottom);
  }
  return faults;
}
"""


def serve(site: pathlib.Path) -> str:
    """The site on a port of this machine, until the process ends; its address."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    handler.func.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/"


def look(page: Page, address: str, root: str, most: int) -> list[str]:
    """The faults of one page."""
    said: list[str] = []
    page.on("console", lambda m: m.type in ("error", "warning") and said.append(m.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on(
        "request",
        lambda r: r.url.startswith((root, "data:", "blob:")) or said.append(f"asks {r.url}"),
    )
    page.goto(root + address, wait_until="load")
    return [*page.evaluate(PROBE, most), *said]


def main() -> int:
    """Prints the faults of every page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", nargs="?", type=pathlib.Path, default=pathlib.Path("out/site"))
    parser.add_argument("--chromium", help="an executable; playwright's own if not given")
    parser.add_argument("--shots", type=pathlib.Path, help="a folder for pictures of every page")
    args = parser.parse_args()
    pages = sorted(path.relative_to(args.site).as_posix() for path in args.site.rglob("*.html"))
    found, root = 0, serve(args.site)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=args.chromium, args=["--no-sandbox"])
        for width, scheme in [(w, s) for w in (1280, 390) for s in ("light", "dark")]:
            size = {"width": width, "height": HEIGHT}
            for address in pages:
                page = browser.new_page(viewport=size, color_scheme=scheme)
                faults = look(page, address, root, SCREENS * HEIGHT if width > 1000 else 0)
                for fault in faults:
                    print(f"{width:>5} {scheme:<6} {address:<32} {fault}")
                if args.shots:
                    name = f"{address.removesuffix('.html').replace('/', '-')}-{width}-{scheme}.png"
                    page.screenshot(path=args.shots / name, full_page=True)
                page.close()
                found += len(faults)
    print(f"{len(pages)} pages, 2 widths, 2 schemes: {found} faults")
    return min(found, 1)


if __name__ == "__main__":
    raise SystemExit(main())
