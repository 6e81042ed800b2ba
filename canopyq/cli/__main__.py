from canopyq.cli import main

main()
