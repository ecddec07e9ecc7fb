//! The articles' commands, as written, with `updraft` in place of `sky`, on this machine.

use crate::World;

#[test]
fn the_articles_commands_work_as_written() {
    let world = World::new();
    let said = world.ok("launch -c mycluster cluster.yaml --env-file .env -y");
    assert_eq!(said, "train.py\nnumpy\n7\n");
    world.ok("exec mycluster task.yaml -d");
    assert_eq!(world.ok("logs mycluster"), "queued\n");
    assert!(world.ok("queue mycluster").contains("SUCCEEDED"));
    let status: serde_json::Value =
        serde_json::from_str(&world.ok("status -o json")).expect("json");
    assert_eq!(status[0]["name"], "mycluster");
    assert_eq!(status[0]["status"], "UP");
    world.ok("autostop mycluster -i 10 --down");
    assert!(world.ok("status").contains("10m (down)"));
    assert_eq!(
        world.run("exec mycluster fails.yaml").status.code(),
        Some(100)
    );
    world.ok("stop mycluster");
    world.ok("start mycluster");
    world.ok("down mycluster -y");
    assert_eq!(world.ok("status -o json").trim(), "[]");
    let costs: serde_json::Value =
        serde_json::from_str(&world.ok("cost-report -o json")).expect("json");
    assert_eq!(costs[0]["running"], false);
    assert_eq!(world.ok("gc -o json").trim(), "[]");
}

#[test]
fn what_goes_wrong_is_said_and_has_a_code() {
    let world = World::new();
    assert_eq!(world.run("fly").status.code(), Some(2));
    assert_eq!(world.run("down nothing").status.code(), Some(1));
    let output = world.run("launch -c c cluster.yaml -y");
    assert_eq!(output.status.code(), Some(1));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        errors.contains("environment variable `WANDB_TOKEN` has no value"),
        "{errors}"
    );
    world.write(
        "gpu.yaml",
        "resources: {accelerators: A10g:1}\nrun: 'true'\n",
    );
    let plan = world.ok("launch --dryrun gpu.yaml");
    assert!(plan.contains("g5.xlarge"), "{plan}");
    let output = world.run("launch -c c gpu.yaml -y");
    assert_eq!(output.status.code(), Some(1), "this machine has no A10G");
}

#[test]
fn autostop_stays_when_a_cluster_is_launched_again() {
    let world = World::new();
    world.write("none.yaml", "resources: {cloud: local}\n");
    world.ok("launch -c c none.yaml -i 10 --down -y -d");
    world.ok("launch -c c none.yaml -y -d");
    assert!(world.ok("status").contains("10m (down)"));
    world.ok("launch -c d none.yaml --down -y -d");
    assert!(world.ok("status").contains("1m (down)"));
    // What a verb does not know may be meant to keep it from what it does.
    assert_eq!(world.run("down c --dryrun -y").status.code(), Some(2));
    assert!(world.ok("status").contains("10m (down)"));
    // Every name is tried.
    let output = world.run("down c nothing d -y -o json");
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(said.matches("GONE").count(), 2, "{said}");
    assert_eq!(world.ok("status -o json").trim(), "[]");
}
