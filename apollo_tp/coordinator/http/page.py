"""The page: files of the package (no build step, no other host), at / and, also on vLLM's port, at /train/page/."""

from __future__ import annotations

import functools
from importlib import resources

from fastapi import APIRouter
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles

from apollo_tp.coordinator.http.parameters import StrictRoute

PACKAGE, FOLDER = "apollo_tp.coordinator.http", "static"
PREFIX = "/train/page"
"""Below /train, since vLLM's port forwards that to this process."""

router = APIRouter(route_class=StrictRoute)


def files() -> StaticFiles:
    """The application that serves the page's files below PREFIX; PREFIX + "/" is the page."""
    return StaticFiles(packages=[(PACKAGE, FOLDER)], html=True)


@functools.cache
def _html() -> str:
    html = resources.files(PACKAGE).joinpath(FOLDER, "index.html").read_text(encoding="utf-8")
    return html.replace('="./', f'="{PREFIX[1:]}/')  # relative, since a proxy may put a path of its own before all


@router.get("/", response_class=HTMLResponse)
async def page() -> Response:
    """The page."""
    return HTMLResponse(_html())
