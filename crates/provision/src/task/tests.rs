use std::time::Duration;

use super::*;
use crate::resources::{Accelerator, Accelerators, Alternatives, Amount};

fn parse(yaml: &str) -> Task {
    Task::from_yaml(yaml, &EnvOverrides::new()).expect(yaml)
}

/// The error of a file, as a person sees it.
fn check(yaml: &str, expected: &str) {
    let error = Task::from_yaml(yaml, &EnvOverrides::new()).expect_err(yaml);
    assert_eq!(error.to_string(), expected);
}

fn gpu(name: &str, count: u32) -> Accelerator {
    Accelerator {
        name: name.into(),
        count,
    }
}

#[test]
fn an_empty_file_is_a_task_of_one_node() {
    for yaml in ["", "# nothing\n", "resources:\nrun:\nnum_nodes:\n"] {
        let task = parse(yaml);
        assert_eq!((task.num_nodes, task.run), (1, None), "{yaml:?}");
    }
}

#[test]
fn accelerators_list_is_an_order_and_set_is_any_of() {
    let of = |yaml: &str| {
        parse(&format!("resources:\n  accelerators: {yaml}\n"))
            .resources
            .accelerators
    };
    assert_eq!(of("A100:4"), Accelerators::AnyOf(vec![gpu("A100", 4)]));
    assert_eq!(
        of("[T4:1, 'L4']"),
        Accelerators::Ordered(vec![gpu("T4", 1), gpu("L4", 1)])
    );
    assert_eq!(
        of("{A100:1, L4:1}"),
        Accelerators::AnyOf(vec![gpu("A100", 1), gpu("L4", 1)])
    );
    assert_eq!(
        of("{A100: 2, L4: 8}"),
        Accelerators::AnyOf(vec![gpu("A100", 2), gpu("L4", 8)])
    );
}

#[test]
fn amounts_are_exact_or_at_least() {
    let resources = parse("resources: {cpus: 4+, memory: 16}").resources;
    assert_eq!(
        resources.cpus,
        Some(Amount {
            value: 4.0,
            or_more: true
        })
    );
    assert_eq!(
        resources.memory_gib,
        Some(Amount {
            value: 16.0,
            or_more: false
        })
    );
}

#[test]
fn env_values_become_strings_and_overrides_win() {
    let overrides = EnvOverrides::new()
        .with_env_file("A=file\nB=file\nNEW=1\n")
        .expect("env file")
        .with("B", "flag");
    let yaml = "envs: {A: 1, B: 2, C: 3, D: true}\nsecrets: {TOKEN: s3cret}\n";
    let task = Task::from_yaml(yaml, &overrides).expect("task");
    let envs: Vec<_> = task.envs.iter().map(|(k, v)| format!("{k}={v}")).collect();
    assert_eq!(envs, ["A=file", "B=flag", "C=3", "D=True", "NEW=1"]);
    assert!(!format!("{task:?}").contains("s3cret"));
}

#[test]
fn a_null_env_without_a_value_is_an_error() {
    check(
        "envs:\n  BUCKET_NAME:\n",
        "environment variable `BUCKET_NAME` has no value; pass --env BUCKET_NAME=VALUE or add it to the --env-file",
    );
}

#[test]
fn variables_are_substituted_in_workdir_and_probe_but_not_in_run() {
    let yaml = "workdir: $ROOT/x\nenvs: {ROOT: /r}\nrun: echo $ROOT\nservice:\n  readiness_probe: ${ROOT}/ready\n";
    let task = parse(yaml);
    assert_eq!(task.workdir.as_deref(), Some("/r/x"));
    assert_eq!(task.run.as_deref(), Some("echo $ROOT"));
    assert_eq!(
        task.service.expect("service").readiness_probe.path,
        "/r/ready"
    );
}

#[test]
fn a_service_has_skypilots_fields_and_defaults() {
    let yaml = "service:\n  readiness_probe:\n    path: /v1/models\n    initial_delay_seconds: 5\n  replicas: 2\n";
    let service = parse(yaml).service.expect("service");
    assert_eq!(service.replicas, 2);
    assert_eq!(
        service.readiness_probe.initial_delay,
        Duration::from_secs(5)
    );
    assert_eq!(service.readiness_probe.timeout, Duration::from_secs(15));
}

#[test]
fn errors_point_into_the_file() {
    check(
        "name: x\nrum: echo\n",
        "line 2, column 1: unknown field `rum`; did you mean `run`?",
    );
    check(
        "resources:\n  acelerators: A100\n",
        "line 2, column 3: unknown field `resources.acelerators`; did you mean `accelerators`?",
    );
    check(
        "resources:\n  image_id: docker:x\n",
        "line 2, column 3: field `resources.image_id` is not supported by updraft; remove it, or run this task with SkyPilot",
    );
    check(
        "num_nodes: 0\n",
        "line 1, column 12: `num_nodes` must be a whole number of at least 1",
    );
    check(
        "resources: {cpus: many}\n",
        "line 1, column 19: `resources.cpus` must be a number such as 4, or 4+ for at least four",
    );
    check(
        "- a\n",
        "line 1, column 1: `task` must be a mapping of fields",
    );
}

#[test]
fn what_skypilot_refuses_too_comes_before_what_only_updraft_refuses() {
    check(
        "resources:\n  image_id: docker:x\n  cpus: many\n",
        "line 3, column 9: `resources.cpus` must be a number such as 4, or 4+ for at least four",
    );
}

#[test]
fn alternatives_are_complete_and_joined_with_the_base() {
    let yaml = "resources:\n  cpus: 4+\n  labels: {a: b}\n  ordered:\n    - {infra: aws/us-east-1, labels: {c: d}}\n    - {cpus: 8, gpus: L4}\n";
    let Alternatives::Ordered(list) = parse(yaml).resources.alternatives else {
        panic!("ordered");
    };
    assert_eq!(list[0].cloud.as_deref(), Some("aws"));
    assert_eq!(list[0].region.as_deref(), Some("us-east-1"));
    assert_eq!(list[0].cpus, Amount::parse("4+"));
    assert_eq!(list[0].labels.len(), 2);
    assert_eq!(list[1].cpus, Amount::parse("8"));
    assert_eq!(
        list[1].accelerators,
        Accelerators::AnyOf(vec![gpu("L4", 1)])
    );
}

#[test]
fn file_mounts_see_the_variables_in_both_columns() {
    let yaml = "envs: {SIZE: 7}\nfile_mounts:\n  /data-$SIZE: s3://bucket/${SIZE}b\n  ~/in: ./in\n";
    let mounts = parse(yaml).file_mounts;
    assert_eq!(mounts[0].target, "/data-7");
    assert_eq!(
        mounts[0].source,
        MountSource::Bucket("s3://bucket/7b".into())
    );
    assert_eq!(mounts[1].source, MountSource::Local("./in".into()));
}

#[test]
fn autostop_in_all_its_forms() {
    let of = |yaml: &str| {
        let autostop = parse(&format!("resources:\n  autostop: {yaml}\n"))
            .resources
            .autostop;
        autostop.map(|autostop| (autostop.idle.map(|idle| idle.as_secs() / 60), autostop.down))
    };
    assert_eq!(of("true"), Some((Some(5), false)));
    assert_eq!(of("false"), Some((None, false)));
    assert_eq!(of("2h"), Some((Some(120), false)));
    assert_eq!(of("{idle_minutes: 10, down: true}"), Some((Some(10), true)));
}

#[test]
fn a_secret_reaches_neither_debug_nor_errors() {
    let overrides = EnvOverrides::new().with_secret("TOKEN", "hunter2");
    let yaml = "secrets: {TOKEN:}\nenvs: {A: b}\n";
    let task = Task::from_yaml(yaml, &overrides).expect("filled");
    assert_eq!(task.secrets["TOKEN"].expose(), "hunter2");
    assert!(!format!("{task:?}").contains("hunter2"));
    let error = Task::from_yaml(yaml, &EnvOverrides::new()).expect_err("unfilled");
    assert!(matches!(error, Error::MissingSecret { .. }), "{error:?}");
}

#[test]
fn what_is_not_yaml_is_named_with_its_line() {
    let error =
        Task::from_yaml("run: |\n  a\n b: [\n", &EnvOverrides::new()).expect_err("not yaml");
    assert!(matches!(error, Error::Yaml { .. }), "{error:?}");
    assert!(error.to_string().contains("line"), "{error}");
}
