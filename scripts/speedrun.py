"""Same as `nanogpt demo, or nanogpt train`."""

from nanogpt.lab.speedrun import main

if __name__ == "__main__":
    main()
