"""Questions about pictures: a model's answers, their scores, and how far one gets without looking."""

from keepsight.evaluation.prior import text_only_prior
from keepsight.evaluation.questions import Question, QuestionError, load_questions
from keepsight.evaluation.record import keep
from keepsight.evaluation.run import Evaluation, evaluate

__all__ = ["Evaluation", "Question", "QuestionError", "evaluate", "keep", "load_questions", "text_only_prior"]
