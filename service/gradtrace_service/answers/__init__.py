"""From the body of a request to the document that answers it: questions are checked, hits are rendered.

No HTTP here."""
