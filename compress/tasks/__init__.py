"""What a model is for: how its outputs are scored and compared, what it is trained for, how one is shown.

`Task` is the interface and `Classification` its first implementation. Everything that depends on the meaning of an output
asks the task of the workload; nothing else takes a maximum over classes.
"""

from compress.tasks.base import Difference, Score, Task, share
from compress.tasks.classification import CLASSIFICATION, Classification

__all__ = ["CLASSIFICATION", "Classification", "Difference", "Score", "Task", "share"]
