"""A report as others want to read it: text for people and logs, JSON for scripts, SARIF for code hosts, HTML for mail.

One module a form, each imported when it is asked for; `plain` holds what they share.
"""

from __future__ import annotations
