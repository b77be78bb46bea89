"`python -m qalign`: the command line. Written by hand, since no notebook can export a file that only starts a program."

from qalign.cli import main

if __name__ == "__main__":  # not where a process of its own reads this file again
    main()
