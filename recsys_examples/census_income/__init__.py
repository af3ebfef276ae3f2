"""Census-Income: multi-task models with equal search budgets on two task groups."""
