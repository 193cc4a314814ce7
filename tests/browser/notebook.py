"""One notebook in a browser: run its cells, work its controls, read what it shows.

Why: a widget that works in Python can still be unusable, because its messages get lost, a key does
nothing or a label does not fit. So this presses keys, drags handles and reads the page; and it
keeps a list of ``troubles``, everything that the browser complained about or fetched from
somewhere else.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Locator, TimeoutError, expect

from tests.browser.lab import Lab

PATIENCE = 30_000  # milliseconds for one reaction of the page, on a busy machine

ROWS = "rows => rows.map(row => Array.from(row.cells, c => c.innerText.trim()).slice(0, 2))"
HERE = ("127.0.0.1", "localhost")
CURRENT = (
    "const panel = window.jupyterapp.shell.currentWidget; const cells = panel.content.widgets;"
)


class Notebook:
    """One notebook in a page of its own; ``show`` chooses the cell that all other methods mean."""

    def __init__(self, browser: Browser, lab: Lab) -> None:
        self.lab = lab
        self.troubles: list[str] = []
        # As wide as a laptop's window; high, so that an explorer fits into one screenshot.
        self.page = browser.new_page(viewport={"width": 1280, "height": 1500})
        self.page.set_default_timeout(PATIENCE)
        self.page.on("pageerror", lambda error: self.troubles.append(f"page error: {error}"))
        self.page.on("console", self._heard)
        self.page.on("request", lambda request: self._asked(request.url))
        self.page.on("websocket", lambda socket: self._asked(socket.url))
        self.cell = self.page.locator("[data-tested]")

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            place = message.location.get("url", "")
            self.troubles.append(f"console: {message.text} ({place})")

    def _asked(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("data", "blob") and parts.hostname not in HERE:
            self.troubles.append(f"request that leaves this machine: {url}")

    def open(self, name: str, seconds: float = 180) -> None:
        """Open it and run all cells.

        AssertionError if that takes too long, or if a cell fails.
        """
        space = f"{self.lab.address}/lab/workspaces/{secrets.token_hex(4)}"
        self.page.goto(f"{space}/tree/{quote(name)}?token={self.lab.token}")
        # The session's own word, not the toolbar's: before it, Run All asks for a kernel.
        idle = "() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel"
        self._wait(f"{idle}?.status === 'idle'", seconds, f"{name}: no idle kernel")
        self.execute("notebook:run-all-cells", f"running the cells of {name}", seconds)
        failed = self.page.evaluate(
            f"""() => {{ {CURRENT} return cells.filter(c => c.model.type === 'code')
            .flatMap(c => c.model.outputs.toJSON().filter(o => o.output_type === 'error')
            .map(o => c.model.sharedModel.source + '\\n' + o.ename + ': ' + o.evalue)) }}"""
        )
        assert not failed, f"{name}: a cell failed:\n" + "\n".join(failed)

    def execute(self, command: str, what: str, seconds: float = 180) -> None:
        """Run a command of JupyterLab and wait until the cells that it started have ended."""
        self.page.evaluate(
            """command => { window.ended = null; window.jupyterapp.commands.execute(command)
            .then(() => { window.ended = 'well' }, error => { window.ended = `${error}` }) }""",
            command,
        )
        idle = f"{{ {CURRENT} return panel.sessionContext.session.kernel.status === 'idle' }}"
        self._wait(f"() => window.ended && (() => {idle})()", seconds, what)
        assert (ended := self.page.evaluate("window.ended")) == "well", f"{what}: {ended}"

    def _wait(self, condition: str, seconds: float, what: str) -> None:
        try:
            self.page.wait_for_function(condition, timeout=seconds * 1000)
        except TimeoutError:
            raise AssertionError(f"{what}: not done after {seconds:.0f} s") from None

    def show(self, source: str) -> None:
        """Scroll to the first code cell that contains ``source``, and work with that one."""
        found = self.page.evaluate(
            f"""async source => {{ {CURRENT}
            const index = cells.findIndex(
                c => c.model.type === 'code' && c.model.sharedModel.source.includes(source));
            if (index < 0) return false;
            document.querySelectorAll('[data-tested]').forEach(n => delete n.dataset.tested);
            panel.content.deselectAll();
            panel.content.activeCellIndex = index;
            await panel.content.scrollToItem(index, 'start');
            cells[index].node.dataset.tested = '';
            return true }}""",
            source,
        )
        assert found, f"no code cell contains {source!r}"

    def run(self, source: str) -> str:
        """Run the cell that contains ``source`` again; the text that it prints."""
        self.show(source)
        self.execute("notebook:run-cell", f"running {source}")
        return self.cell.locator(".jp-OutputArea-output").all_inner_texts()[-1]

    def control(self, label: str) -> Locator:
        """The widget with this description, scrolled into view."""
        text = self.page.locator("label").filter(has_text=re.compile(f"^{re.escape(label)}$"))
        rows = ".widget-inline-hbox, .widget-checkbox, .widget-toggle-buttons"
        widget = self.cell.locator(rows).filter(has=text, visible=True)
        widget.scroll_into_view_if_needed()
        return widget

    def press(self, label: str, key: str, times: int = 1) -> None:
        """Focus the control and press a key, as often as said."""
        part = ".noUi-handle, input, select, button.mod-active, button:first-of-type"
        handle = self.control(label).locator(part).first
        handle.focus()
        for _ in range(times):
            self.page.keyboard.press(key)

    def drag(self, label: str, fraction: float) -> None:
        """Drag a slider's handle with the mouse: 0 is the left end, 1 the right one."""
        control = self.control(label)
        track = control.locator(".noUi-base").bounding_box()
        handle = control.locator(".noUi-handle").bounding_box()
        assert track, f"the slider {label!r} is not visible"
        assert handle, f"the slider {label!r} has no visible handle"
        middle = handle["y"] + handle["height"] / 2
        self.page.mouse.move(handle["x"] + handle["width"] / 2, middle)
        self.page.mouse.down()
        self.page.mouse.move(track["x"] + fraction * track["width"], middle, steps=8)
        self.page.mouse.up()

    def choose(self, label: str, option: str, by: str = "keyboard") -> None:
        """Choose in a dropdown or a row of buttons, by 'keyboard' or by 'mouse'."""
        control = self.control(label)
        menu = control.locator("select")
        if not menu.count():
            self.push(control.get_by_role("button", name=option, exact=True), by)
        elif by == "mouse":
            menu.select_option(label=option)  # the open menu is no part of the page
        else:
            menu.focus()
            texts = menu.locator("option").all_inner_texts()
            options = [text.replace("\xa0", " ") for text in texts]
            steps = options.index(option) - menu.evaluate("menu => menu.selectedIndex")
            # Space first: while the menu is closed, arrows and letters are JupyterLab's shortcuts.
            self.page.keyboard.press("Space")
            expect(control.locator("select:open")).to_have_count(1)
            for _ in range(abs(steps)):
                self.page.keyboard.press("ArrowDown" if steps > 0 else "ArrowUp")
            self.page.keyboard.press("Enter")
            expect(menu.locator("option:checked")).to_have_text(option)

    def tab(self, title: str) -> None:
        """Click on a tab."""
        self.cell.locator(".lm-TabBar-tab", has_text=title).click()

    def push(self, button: Locator, by: str = "keyboard") -> None:
        """Push a button or a checkbox, by 'keyboard' or by 'mouse'."""
        if by == "mouse":
            button.click()
        else:
            button.focus()
            self.page.keyboard.press("Space")

    def fill(self, label: str, value: float | str) -> None:
        """Type into a field, or into the readout of a slider, in place of what is there; Enter."""
        field = self.control(label).locator("input, .widget-readout").first
        field.click()
        self.page.keyboard.press("ControlOrMeta+A")
        self.page.keyboard.press("Delete") if value == "" else self.page.keyboard.type(str(value))
        self.page.keyboard.press("Enter")

    def readout(self, label: str) -> str:
        """The text beside a slider, in a field or in a menu."""
        part = self.control(label).locator("input, select, .widget-readout, .mod-active").first
        return part.evaluate("e => e.selectedOptions?.[0].text ?? e.value ?? e.textContent").strip()

    def numbers(self) -> dict[str, str]:
        """All rows of all tables: the first cell's text, and the second one's."""
        return dict(self.cell.locator("tr").evaluate_all(ROWS))

    def number(self, name: str) -> str:
        """The second cell of the table row whose first cell says ``name``."""
        return self.numbers()[name]

    def expect_numbers(self, expected: dict[str, str]) -> None:
        """Wait until the tables have these rows. AssertionError with what differs."""
        self._poll(lambda: expected.items() <= self.numbers().items())
        now = self.numbers()
        wrong = [f"{name}: {now.get(name)!r}, expected {text!r}" for name, text in expected.items()
                 if now.get(name) != text]  # fmt: skip
        assert not wrong, "\n".join(wrong)

    def picture_hash(self) -> str:
        """The SHA-256 of the widget's picture, once it has been drawn.

        Decoding fails where another picture comes just then: so it is tried again for a second.
        """
        return self.cell.locator("img.widget-image").last.evaluate(
            """async image => {
            for (let left = 20; ; left--) {
                try { await image.decode(); break } catch (error) { if (!left) throw error }
                await new Promise(done => setTimeout(done, 50)) }
            const bytes = await (await fetch(image.src)).arrayBuffer();
            const hash = new Uint8Array(await crypto.subtle.digest('SHA-256', bytes));
            return Array.from(hash, byte => byte.toString(16).padStart(2, '0')).join('') }"""
        )

    def expect_picture(self, png: bytes) -> None:
        """Wait until the widget's picture is this one."""
        wanted = hashlib.sha256(png).hexdigest()
        self._poll(lambda: self.picture_hash() == wanted)
        assert self.picture_hash() == wanted, "the picture is not what the plain function draws"

    def _poll(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE / 1000
        while not condition() and time.monotonic() < end:
            self.page.wait_for_timeout(30)

    def cut_off(self) -> list[str]:
        """Labels, buttons and readouts whose text is wider than their room."""
        return self.cell.locator(
            "label, button, .widget-readout, .lm-TabBar-tabLabel"
        ).evaluate_all(
            "all => all.filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent)"
        )

    def screenshot(self, path: Path) -> None:
        """The output of the cell as a picture."""
        self.cell.locator(".jp-Cell-outputArea").first.screenshot(path=path)

    def close(self) -> None:
        """End the kernel and close the page. AssertionError if the browser had to complain."""
        troubles = list(self.troubles)  # later ones are requests that the end of the kernel cancels
        try:
            self.page.evaluate("window.jupyterapp?.serviceManager.sessions.shutdownAll()")
        finally:
            self.page.close()
        assert not troubles, "the browser complained:\n" + "\n".join(troubles)
