#!/usr/bin/env bash
# Makes sure that the browser tests find a Chromium: takes one that is there, else installs one.
#   bash tools/install_browser.sh [python of the environment that has playwright]
# Without a browser it says so and succeeds, since the tests then skip themselves, unless CANOPYQ_REQUIRE_BROWSER=1.
set -euo pipefail
python="${1:-.venv/bin/python}"

starts() { [ -n "$1" ] && "$1" --version >/dev/null 2>&1; }

find_browser() {
    local name path
    for name in chromium chromium-browser google-chrome google-chrome-stable; do
        path="$(command -v "$name" || true)"
        if starts "$path"; then echo "$path"; return; fi
    done
    path="$("$python" -c 'from playwright.sync_api import sync_playwright as p
with p() as play: print(play.chromium.executable_path)' 2>/dev/null || true)"
    if starts "$path"; then echo "$path"; return; fi
    return 1
}

if browser="$(find_browser)"; then echo "browser: $browser"; exit 0; fi

as_root() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }
if as_root; then
    echo "browser: none found; installing Chromium with apt-get"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium; } \
        >/dev/null || echo "browser: apt-get could not install chromium"
fi
if ! find_browser >/dev/null; then
    echo "browser: installing Playwright's Chromium"
    "$python" -m playwright install $(as_root && echo --with-deps) chromium || true
fi

if browser="$(find_browser)"; then echo "browser: $browser"; exit 0; fi
cure="install Chromium or Google Chrome and run again"
if [ "${CANOPYQ_REQUIRE_BROWSER:-0}" = 1 ]; then
    echo "browser: none could be installed, and CANOPYQ_REQUIRE_BROWSER=1 makes that a failure; $cure"
    exit 1
fi
echo "browser: none could be installed, so the browser tests skip themselves; $cure"
