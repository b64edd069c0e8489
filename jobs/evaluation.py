"""`spark-submit jobs/evaluation.py --settings FILE`: the stage `evaluation`, see pipeline/evaluation.py."""

from jobs.stage import main

if __name__ == "__main__":
    main("evaluation")
