"""The web app.

settings (environment), server (routes), page (layout), form, handlers (what buttons do), views (HTML), api (endpoints),
shell (questions to `python -m compress`), phone (narrow charts), theme with page.css and page.js.
"""
