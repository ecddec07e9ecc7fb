//! `-o json`: standard output is for programs, whatever the verb.

use serde_json::Value;

use crate::World;
use crate::services::SERVICE;

/// Runs a verb with `-o json`; every line of its output is a document. What people read is elsewhere.
fn lines(world: &World, line: &str) -> Vec<Value> {
    let said = world.ok(&format!("{line} -o json"));
    let documents = said.lines().map(|document| {
        let parsed = serde_json::from_str(document);
        parsed.unwrap_or_else(|_| panic!("{line}: not JSON: {document}"))
    });
    documents.collect()
}

/// As [`lines`], where there is exactly one document.
fn one(world: &World, line: &str) -> Value {
    let mut documents = lines(world, line);
    assert_eq!(documents.len(), 1, "{line}: {documents:?}");
    documents.remove(0)
}

#[test]
fn every_verb_answers_programs_in_json_alone() {
    let world = World::new();
    world.write(
        "talks.yaml",
        "name: talks\nrun: echo one; echo '{'; echo two >&2\n",
    );
    world.write(
        "two.yaml",
        "name: a\nrun: echo a\n---\nname: b\nrun: echo b\n",
    );

    assert_eq!(one(&world, "status"), serde_json::json!([]));
    assert_eq!(one(&world, "check")[0]["provider"], "local");
    assert!(
        one(&world, "gpus")
            .as_array()
            .is_some_and(|all| !all.is_empty())
    );
    assert_eq!(one(&world, "launch --dryrun talks.yaml")["num_nodes"], 1);

    // Followed: the number, the lines, and the end.
    let told = lines(&world, "launch -c c talks.yaml -y");
    assert_eq!(told[0]["job_id"], 1);
    let mut output: Vec<_> = told
        .iter()
        .filter_map(|line| line["line"].as_str())
        .collect();
    output.sort_unstable(); // the two streams of a process have no order between them
    assert_eq!(output, ["one", "two", "{"]);
    let end = told.last().expect("an end");
    assert_eq!(
        (&end["status"], &end["exit_code"]),
        (&"SUCCEEDED".into(), &0.into())
    );
    assert_eq!(
        lines(&world, "launch -c c two.yaml -y").len(),
        6,
        "a pipeline"
    );
    assert_eq!(lines(&world, "exec c talks.yaml").len(), 5);
    let detached = one(&world, "exec c talks.yaml -d");
    assert_eq!(detached["cluster"], "c");
    let followed = lines(&world, &format!("logs c {}", detached["job_id"]));
    assert_eq!(followed.last().expect("an end")["status"], "SUCCEEDED");
    assert_eq!(lines(&world, "logs c 1 --no-follow").len(), 3);
    assert_eq!(one(&world, "queue c").as_array().map(Vec::len), Some(5));

    assert_eq!(one(&world, "autostop c -i 10")["autostop_minutes"], 10);
    assert_eq!(one(&world, "cancel c --all")["cancelled"], 0);
    assert_eq!(one(&world, "stop c")["status"], "STOPPED");
    assert_eq!(one(&world, "start c")["status"], "UP");
    assert_eq!(one(&world, "status --refresh")[0]["status"], "UP");
    assert_eq!(one(&world, "cost-report")[0]["running"], true);
    assert_eq!(one(&world, "gc"), serde_json::json!([]));
    assert_eq!(one(&world, "down c -y")["status"], "GONE");

    world.write("svc.yaml", SERVICE);
    let begun = one(&world, "serve up -n web svc.yaml --env WORD=one -y -d");
    assert_eq!(
        (&begun["name"], &begun["version"]),
        (&"web".into(), &1.into())
    );
    assert_eq!(one(&world, "serve status")[0]["name"], "web");
    let updated = one(&world, "serve update web svc.yaml --env WORD=two");
    assert_eq!(updated["url"], begun["url"]);
    assert_eq!(one(&world, "serve down web -y")["status"], "GONE");
}

/// What goes wrong is told to people: standard output stays empty, or what it was.
#[test]
fn errors_are_not_in_the_answer() {
    let world = World::new();
    for line in [
        "down nothing -y",
        "queue nothing",
        "launch missing.yaml -y",
        "fly",
    ] {
        let output = world.run(&format!("{line} -o json"));
        assert!(!output.status.success(), "{line}");
        assert_eq!(String::from_utf8_lossy(&output.stdout), "", "{line}");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(errors.starts_with("error: "), "{line}: {errors}");
    }
    let output = world.run("launch -c c fails.yaml -y -o json");
    assert_eq!(output.status.code(), Some(100));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let end: Value = serde_json::from_str(said.lines().last().expect("an end")).expect("JSON");
    assert_eq!(
        (&end["status"], &end["exit_code"]),
        (&"FAILED".into(), &7.into())
    );
    world.ok("down c -y");
}
