"""`spark-submit jobs/ingest.py --settings FILE`: the stage `ingest`, see pipeline/ingest.py."""

from jobs.stage import main

if __name__ == "__main__":
    main("ingest")
