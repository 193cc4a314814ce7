"""A real JupyterLab in a real browser: what a reader of the notebooks clicks and sees."""
