"""What operators read: logs, request ids, the audit log and traces. Nothing here answers requests."""
