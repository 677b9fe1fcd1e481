"""An answer as one HTML file: with its pictures, without a script, and nothing that it loads."""

from gradtrace_client._html_file.document import document_html as document_html
