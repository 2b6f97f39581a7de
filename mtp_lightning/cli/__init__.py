"""The command `mtp`: one file per topic; each verb imports what it needs when it runs."""
