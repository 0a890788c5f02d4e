"""Draw docs/attention.png: a page of a sample, as a browser shows it.

python docs/attention.py runs/nanogpt-cpu
"""

import base64
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
TOKEN, HEAD = 39, 6  # that are looked at: the d of a word, and the third head of the second layer
SCREEN = {"width": 1366, "height": 768, "deviceScaleFactor": 1, "mobile": False}


def main() -> None:
    from browser import show, started

    with tempfile.TemporaryDirectory() as folder, started() as browser:
        page = Path(folder) / "page.html"
        options = ["--model", sys.argv[1], "--prompt", "ROMEO:", "--quiet", "--attention", page]
        subprocess.run([sys.executable, ROOT / "sample.py", *options], check=True, stdout=subprocess.DEVNULL)
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", SCREEN)
        show(browser, page)
        browser.execute_script(f"state.token = {TOKEN}; state.head = {HEAD}; show()")
        (ROOT / "docs" / "attention.png").write_bytes(base64.b64decode(browser.get_screenshot_as_base64()))


if __name__ == "__main__":
    main()
