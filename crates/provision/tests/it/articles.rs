//! Task files of the shape of the two articles': ours with the same keys, and the articles' own where a
//! machine has them.

use std::path::Path;

use updraft_provision::{Accelerators, EnvOverrides, Task, Warning};

const ENV_FILE: &str = "\
# a key pair
AWS_ACCESS_KEY_ID=tid_ours
AWS_SECRET_ACCESS_KEY=tsec_ours

MODEL_NAME=makers/Large-7B
";

fn read(name: &str) -> Task {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases");
    let text = std::fs::read_to_string(folder.join(name)).expect("a case");
    let overrides = EnvOverrides::new().with_env_file(ENV_FILE);
    Task::from_yaml(&text, &overrides.expect("env file")).expect(name)
}

/// `accelerators` as a task file writes them.
fn names(task: &Task) -> (bool, Vec<String>) {
    let choices = task.resources.accelerators.choices();
    let is_order = matches!(task.resources.accelerators, Accelerators::Ordered(_));
    (is_order, choices.iter().map(ToString::to_string).collect())
}

#[test]
fn the_first_articles_files_mean_what_they_say() {
    for name in ["article-cluster.yaml", "article-dotenv.yaml"] {
        let task = read(name);
        assert_eq!(task.resources.cloud.as_deref(), Some("aws"));
        assert_eq!(names(&task), (false, vec!["A100:4".to_owned()]));
        assert_eq!((task.workdir.as_deref(), task.num_nodes), (Some("."), 1));
        assert_eq!(task.run.as_deref(), Some("python tune.py\n"));
        let setup = task.setup.expect("a setup");
        assert!(setup.contains("\n\n"), "its empty lines are kept: {setup}");
    }
}

#[test]
fn the_second_articles_files_mean_what_they_say() {
    let (train, serve) = (read("article-pipeline.yaml"), read("article-service.yaml"));
    let order = ["T4:1", "A100-80GB:1", "A100-80GB:8"].map(str::to_owned);
    assert_eq!(names(&train), (true, order.to_vec()));
    assert_eq!(train.envs["AWS_ACCESS_KEY_ID"], "tid_ours");
    assert_eq!(
        train.envs["MODEL_NAME"], "makers/Large-7B",
        "of the env file"
    );
    assert_eq!(train.envs["BUCKET_NAME"], "ours", "of the task");
    let setup = train.setup.as_deref().unwrap_or_default();
    assert!(setup.contains("\n[default]\n"), "a here-document: {setup}");
    assert_eq!((names(&serve).0, names(&serve).1.len()), (true, 10));
    assert_eq!(serve.resources.ports, [8080]);
    let service = serve.service.as_ref().expect("a service");
    assert_eq!(
        (service.readiness_probe.path.as_str(), service.replicas),
        ("/v1/models", 2)
    );
    // Both of its traps are told: the delay, and the path that the training does not write.
    let warnings = serve.warnings(std::slice::from_ref(&train));
    assert!(
        matches!(
            warnings.as_slice(),
            [
                Warning::ShortInitialDelay { .. },
                Warning::NobodyWrites { .. }
            ]
        ),
        "{warnings:?}"
    );
}

/// The YAML blocks of the articles themselves, beside the fixtures.
#[test]
#[expect(clippy::print_stderr, reason = "a test that skips says why")]
fn the_articles_own_files_are_read_verbatim() {
    let Some(fixtures) = std::env::var_os("UPDRAFT_FIXTURES") else {
        eprintln!("skipped: UPDRAFT_FIXTURES is not set");
        return;
    };
    let articles = Path::new(&fixtures).join("../reference/articles");
    let Ok(entries) = std::fs::read_dir(&articles) else {
        eprintln!("skipped: no articles beside the fixtures");
        return;
    };
    let mut blocks = 0;
    for entry in entries {
        let text = std::fs::read_to_string(entry.expect("entry").path()).expect("an article");
        for block in text.split("```yaml\n").skip(1) {
            let yaml = block.split("```").next().unwrap_or_default();
            let task = Task::from_yaml(yaml, &EnvOverrides::new()).expect(yaml);
            assert_eq!(names(&task).1, ["A100:4"], "{yaml}");
            blocks += 1;
        }
    }
    assert!(blocks > 0, "no YAML in the articles beside the fixtures");
}
