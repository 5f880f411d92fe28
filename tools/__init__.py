"""Command lines over the libraries; `lintra --help` lists them."""
