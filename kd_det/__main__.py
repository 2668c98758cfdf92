from kd_det.cli.main import main

if __name__ == "__main__":
    main()
