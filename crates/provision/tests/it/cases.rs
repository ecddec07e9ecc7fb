//! Task files with recorded verdicts: the first line of each file says what must be said of it.
//!
//! `# accept`, `# unsupported: …` or `# refuse: …`, with the error word for word. The verdicts were
//! held against SkyPilot's own by `.ci/peers/check_tasks`.

use std::path::Path;

use updraft_provision::{EnvOverrides, Error, Pipeline, Warning};

fn verdict(text: &str) -> String {
    match Pipeline::from_yaml(text, &EnvOverrides::new()) {
        Ok(_) => "accept".to_owned(),
        Err(error @ (Error::Unsupported { .. } | Error::MissingSecret { .. })) => {
            format!("unsupported: {error}")
        }
        Err(error) => format!("refuse: {error}"),
    }
}

#[test]
fn every_case_has_its_recorded_verdict() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases");
    let mut wrong = Vec::new();
    let mut cases = 0;
    for entry in std::fs::read_dir(folder).expect("cases") {
        let path = entry.expect("entry").path();
        let text = std::fs::read_to_string(&path).expect("a case");
        let recorded = text.lines().next().and_then(|line| line.strip_prefix("# "));
        let got = verdict(&text).replace('\n', " ");
        if recorded != Some(got.as_str()) {
            wrong.push(format!("{}: {got}", path.display()));
        }
        cases += 1;
    }
    assert!(cases >= 150, "{cases} cases are too few");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The two traps: a path that nobody writes, and a probe that ends a loading replica.
#[test]
fn the_traps_of_a_service_are_warned_about() {
    let train = "name: train\nrun: python train.py --out ~/models/done/tiny/fused\n";
    let serve = "service:\n  readiness_probe: {path: /v1/models, initial_delay_seconds: 5}\n\
                 run: |\n  server --port 8080 \\\n    --model ~/models/tiny/fused\n";
    let parse = |text: &str| {
        Pipeline::from_yaml(text, &EnvOverrides::new())
            .expect(text)
            .tasks
    };
    let earlier = parse(train);
    let warnings = parse(serve)[0].warnings(&earlier);
    let [
        Warning::ShortInitialDelay { .. },
        Warning::NobodyWrites { path },
    ] = warnings.as_slice()
    else {
        panic!("{warnings:?}");
    };
    assert_eq!(path, "~/models/tiny/fused");
    let right = serve
        .replace("~/models/tiny", "~/models/done/tiny")
        .replace("seconds: 5", "seconds: 600");
    assert_eq!(parse(&right)[0].warnings(&earlier), []);
}

/// No text makes the reader panic: prefixes and mutilations of every case.
#[test]
fn mutilated_files_are_errors_not_panics() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases");
    let mut read = 0;
    for entry in std::fs::read_dir(folder).expect("cases") {
        let text = std::fs::read_to_string(entry.expect("entry").path()).expect("a case");
        for (at, _) in text.char_indices().step_by(7) {
            let cut = &text[..at];
            let swapped = text.replace(text[at..].chars().next().unwrap_or(' '), "[");
            read += [verdict(cut), verdict(&swapped)].len();
        }
    }
    assert!(read > 1000, "{read}");
}
