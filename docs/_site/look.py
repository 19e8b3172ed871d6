"""Looks at the built site in Chromium without network: python -m docs._site.look [PAGE ...].

Every page is opened at two widths, light and dark. A request for anything but a file of the site,
an error of a script, a formula that MathJax could not read, text that is wider than the page, and
text of low contrast are reported, and make the exit code 1. Pictures of the pages that are named,
or of a few, are written to build/looks.
"""

import argparse
import asyncio
import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from playwright.async_api import Browser, Page, async_playwright

ROOT = pathlib.Path(__file__).resolve().parents[2]
SITE, LOOKS = ROOT / "build" / "html", ROOT / "build" / "looks"
SHOWN = (
    *("index", "start", "questions", "concepts/truncation", "howto/monitor", "howto/adamw"),
    *("reference/directions", "reference/around", "benchmarks", "migration"),
)
WIDTHS = {"phone": 390, "desktop": 1280}
# Elements of the article that are wider than the window, unless something around them scrolls; and
# text whose contrast is below 4.5 (3 where it is large), by the formula of WCAG 2.
FOUND = """() => {
  const problems = [];
  if (document.documentElement.scrollWidth > window.innerWidth + 1)
    problems.push(`the page is ${document.documentElement.scrollWidth} pixels wide`);
  for (const e of document.querySelectorAll('mjx-merror, [data-mjx-error]'))
    problems.push(`formula: ${e.textContent}`);
  if (document.querySelector('div.math, span.math') && !document.querySelector('mjx-container'))
    problems.push('formulas are not drawn');
  for (const image of document.images)
    if (image.complete && !image.naturalWidth) problems.push(`no picture ${image.src}`);
  const rgba = text => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = rgba(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0.9) return c;
    }
    return [255, 255, 255];
  };
  const seen = new Set();
  const article = document.querySelector('article') || document.body;
  const walker = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement, style = getComputedStyle(e);
    const hidden = !e.checkVisibility({opacityProperty: true, visibilityProperty: true});
    if (!walker.currentNode.data.trim() || hidden || e.closest('.headerlink')) continue;
    const [a, b] = [light(rgba(style.color)), light(behind(e))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05), size = parseFloat(style.fontSize);
    const key = `${e.className} ${style.color}`;
    if (ratio < (size >= 24 ? 3 : 4.5) && !seen.has(key)) {
      seen.add(key);
      problems.push(`contrast ${ratio.toFixed(1)}: ${walker.currentNode.data.trim().slice(0, 40)}`
        + ` (${e.tagName}.${e.className}, ${style.color})`);
    }
  }
  return problems;
}"""


class Look(NamedTuple):
    """One way to look at a page."""

    width: str
    scheme: str


async def problems_of(page: Page, name: str, look: Look, picture: bool) -> list[str]:
    """Opens one page and returns what is wrong with it."""
    found: list[str] = []

    async def serve(route: Any) -> None:
        if route.request.url.startswith(("file:", "data:", "blob:")):
            await route.continue_()
        else:
            found.append(f"asks for {route.request.url}")
            await route.abort()

    await page.route("**/*", serve)
    page.on("pageerror", lambda error: found.append(f"script: {error}"))
    page.on("requestfailed", lambda request: found.append(f"not there: {request.url}"))
    await page.goto((SITE / f"{name}.html").as_uri())
    has_math = await page.query_selector("div.math, span.math")
    if has_math:
        await page.wait_for_function("window.MathJax && MathJax.startup.promise")
        await page.evaluate("MathJax.startup.promise")
    found += await page.evaluate(FOUND)
    if picture:
        path = LOOKS / f"{name.replace('/', '-')}-{look.width}-{look.scheme}.png"
        await page.screenshot(path=path)
    return [f"{name} ({look.width}, {look.scheme}): {problem}" for problem in found]


async def look_at(browser: Browser, names: Sequence[str], shown: Sequence[str]) -> list[str]:
    """Looks at all pages in all ways."""
    found = []
    for look in [Look(width, scheme) for width in WIDTHS for scheme in ("light", "dark")]:
        size = {"width": WIDTHS[look.width], "height": 900}
        context = await browser.new_context(viewport=size, color_scheme=look.scheme, offline=True)
        for name in names:
            page = await context.new_page()
            problems = await problems_of(page, name, look, name in shown)
            await page.close()
            print("\n".join(problems), end="\n" if problems else "", flush=True)
            found += problems
        await context.close()
    return found


async def run(names: Sequence[str], shown: Sequence[str]) -> list[str]:
    """Starts the system's Chromium and looks."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        raise SystemExit("no chromium on this machine: `apt-get install chromium` or the like")
    LOOKS.mkdir(parents=True, exist_ok=True)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        found = await look_at(browser, names, shown)
        await browser.close()
    return found


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="*", help="as start or howto/adamw; none: all of them")
    pages = parser.parse_args().pages
    made = (path.relative_to(SITE).with_suffix("").as_posix() for path in SITE.rglob("*.html"))
    others = ("_modules", "_static", "genindex")  # code, templates of the theme, a list of names
    every = sorted(name for name in made if not name.startswith(others))
    found = asyncio.run(run(pages or every, pages or SHOWN))
    ways = 2 * len(WIDTHS)
    print(f"{len(pages or every)} pages, {ways} ways each: {len(found)} problems; see {LOOKS}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
