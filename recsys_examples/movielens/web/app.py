"""The application: `/` is the page, `/api/...` the same as JSON.

An error of `/api/...` is `{"error": "one line that names the parameter"}` with status
400, 404, 405, 422 or 500; the page shows the same line.
"""

from __future__ import annotations

import base64
import hashlib
import logging
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

import jinja2
from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from markupsafe import Markup
from starlette.exceptions import HTTPException

from recsys_examples.movielens.explain_command import MEANING
from recsys_examples.movielens.fusion import SCORE_MEANING
from recsys_examples.movielens.recommendations import Explained, ExplainedModel
from recsys_examples.movielens.web import views
from recsys_examples.movielens.web.asked import (
    DEFAULT_MOVIES,
    MOST_MOVIES,
    MOST_TICKED,
    Asked,
    Form,
    ProblemError,
    answer,
    check_given_once,
)

_FOLDER = Path(__file__).parent
_LONGEST = 80  # of a value in an error


class Page:
    """The page as HTML. It needs no other address, and no script.

    Args:
        model: the model whose lists it shows.
    """

    def __init__(self, model: ExplainedModel) -> None:
        self._model = model
        loader = jinja2.FileSystemLoader(_FOLDER)
        environment = jinja2.Environment(
            loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True
        )
        self._template = environment.get_template("page.html")
        self._style = (_FOLDER / "page.css").read_text()
        self._script = (_FOLDER / "page.js").read_text()
        # Nothing is loaded from elsewhere, and nothing else is run.
        self.policy = (
            f"default-src 'none'; img-src data:; style-src '{_hash(self._style)}'; "
            f"script-src '{_hash(self._script)}'; form-action 'self'; "
            "base-uri 'none'; frame-ancestors 'none'"
        )

    def render(
        self,
        form: Form,
        heading: str = "",
        found: Explained | None = None,
        error: str = "",
        status: int = 200,
    ) -> HTMLResponse:
        """Return the page with a list, with an error, or with the form alone."""
        profile = self._model.profile
        text = self._template.render(
            style=Markup(self._style),
            script=Markup(self._script),
            form=form,
            error=error,
            heading=heading,
            found=found,
            movies=[] if found is None else views.movies(found, profile),
            experts=views.experts(profile, found),
            tasks=profile.tasks,
            popular=self._model.popular,
            most_movies=min(MOST_MOVIES, self._model.num_movies),
            most_ticked=MOST_TICKED,
            default_k=DEFAULT_MOVIES,
            score_meaning=SCORE_MEANING,
            meaning=MEANING,
        )
        headers = {"Content-Security-Policy": self.policy}
        return HTMLResponse(text, status, headers)


def make_app(model: ExplainedModel) -> FastAPI:
    """Return the application that serves a model."""
    app = FastAPI(
        title="MovieLens: recommendations and the experts behind them",
        docs_url=None,  # Its page would load scripts from elsewhere.
        redoc_url=None,
        openapi_url="/api/openapi.json",
    )
    page = Page(model)

    once = [Depends(check_given_once)]

    # Not `async`: each call of the model runs in a thread of its own.
    @app.head("/", include_in_schema=False, dependencies=once)
    @app.get("/", response_class=HTMLResponse, dependencies=once)
    def show(request: Request, asked: Annotated[Asked, Query()]) -> Response:
        form = Form.of(request.query_params)
        if asked.is_empty:
            return page.render(form)
        return page.render(form, _heading(asked), answer(model, asked))

    @app.head("/api/recommend", include_in_schema=False, dependencies=once)
    @app.get("/api/recommend", dependencies=once)
    def recommend(asked: Annotated[Asked, Query()]) -> dict[str, Any]:
        return views.as_json(answer(model, asked), asked.user)

    @app.head("/api/experts", include_in_schema=False)
    @app.get("/api/experts")
    def experts() -> dict[str, Any]:
        return views.experts_as_json(model.profile)

    @app.head("/api/health", include_in_schema=False)
    @app.get("/api/health")
    def health() -> dict[str, Any]:
        return {
            "status": "ok",
            "movies": model.num_movies,
            "experts": model.profile.num_experts,
        }

    def failed(request: Request, status: int, text: str) -> Response:
        if request.url.path.startswith("/api/"):
            return JSONResponse({"error": text}, status)
        # The form keeps what was asked for, for whoever corrects it.
        form = Form.of(request.query_params)
        return page.render(form, error=text, status=status)

    @app.exception_handler(ProblemError)
    def problem(request: Request, error: ProblemError) -> Response:
        return failed(request, error.status, error.text)

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> Response:
        return failed(request, 422, _first(error))

    @app.exception_handler(HTTPException)
    def refused(request: Request, error: HTTPException) -> Response:
        reason = HTTPStatus(error.status_code).phrase.lower()
        path = request.url.path[:_LONGEST]
        return failed(request, error.status_code, f"{request.method} {path}: {reason}")

    @app.exception_handler(Exception)
    def broken(request: Request, error: Exception) -> Response:
        logging.getLogger(__name__).error("%s %s", request.method, request.url.path)
        return failed(request, 500, "internal error: see the log of the server")

    @app.middleware("http")
    async def add_headers(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cache-Control"] = "no-store"
        return response

    return app


def _first(error: RequestValidationError) -> str:
    """Return the first fault in one line, with the parameter and its value."""
    fault = error.errors()[0]
    name = next((str(part) for part in fault["loc"][1:]), "parameters")
    if fault["type"] == "extra_forbidden":
        known = ", ".join(Asked.model_fields)
        return f"there is no parameter `{name[:_LONGEST]}`; there are {known}"
    if fault["type"] == "too_long":
        most, count = (fault["ctx"][key] for key in ("max_length", "actual_length"))
        return f"`{name}`: choose at most {most} movies; got {count}"
    rule = fault["msg"][0].lower() + fault["msg"][1:]
    value = repr(fault.get("input"))[:_LONGEST]
    return f"`{name}`: {rule.removeprefix('input ')}; got {value}"


def _heading(asked: Asked) -> str:
    if asked.user is not None:
        return f"For user {asked.user}"
    if asked.movie:
        return f"For a newcomer who likes {len(set(asked.movie))} of the movies"
    return "For a newcomer"


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
