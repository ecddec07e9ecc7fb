use super::*;
use crate::EnvOverrides;
use crate::resources::{Accelerator, Amount};

fn offer(name: &str, accelerator: Option<&str>, usd_per_hour: f64) -> Offer {
    Offer {
        provider: "fake".into(),
        instance_type: name.into(),
        region: "here".into(),
        zone: None,
        cpus: 4.0,
        memory_gib: 16.0,
        disk_gib: None,
        accelerator: accelerator.map(|name| Accelerator {
            name: name.into(),
            count: 1,
        }),
        spot: false,
        usd_per_hour,
    }
}

fn one(name: &str) -> Accelerator {
    Accelerator {
        name: name.into(),
        count: 1,
    }
}

fn check(accelerators: Accelerators, expected: &[&str]) {
    let offers = vec![
        offer("a", Some("A100"), 3.0),
        offer("l", Some("L4"), 1.0),
        offer("c", None, 0.1),
    ];
    let resources = Resources {
        accelerators,
        ..Resources::default()
    };
    let plan = plan(&resources, offers);
    let got: Vec<_> = plan
        .candidates
        .iter()
        .map(|offer| offer.instance_type.as_str())
        .collect();
    assert_eq!(got, expected);
}

#[test]
fn a_list_is_an_order_whatever_the_price() {
    check(
        Accelerators::Ordered(vec![one("a100"), one("L4")]),
        &["a", "l"],
    );
}

#[test]
fn a_set_is_the_cheapest_of_any() {
    check(
        Accelerators::AnyOf(vec![one("A100"), one("l4")]),
        &["l", "a"],
    );
}

#[test]
fn no_accelerator_asked_for_means_cheapest_of_all() {
    check(Accelerators::None, &["c", "l", "a"]);
}

#[test]
fn every_skipped_offer_has_its_reason() {
    let resources = Resources {
        cpus: Some(Amount {
            value: 8.0,
            or_more: true,
        }),
        ..Resources::default()
    };
    let plan = plan(&resources, vec![offer("c", None, 0.1)]);
    assert!(plan.candidates.is_empty());
    assert_eq!(
        plan.skipped[0].to_string(),
        "fake c in here: has 4 cpus, the task asks for 8+"
    );
}

fn names(plan: &Plan) -> Vec<&str> {
    let names = plan
        .candidates
        .iter()
        .map(|offer| offer.instance_type.as_str());
    names.collect()
}

#[test]
fn alternatives_are_an_order_or_any_of() {
    let of = |name: &str| Resources {
        accelerators: Accelerators::AnyOf(vec![one(name)]),
        ..Resources::default()
    };
    let offers = || vec![offer("l", Some("L4"), 1.0), offer("a", Some("A100"), 3.0)];
    let both = vec![of("A100"), of("L4")];
    let ordered = Resources {
        alternatives: Alternatives::Ordered(both.clone()),
        ..Resources::default()
    };
    assert_eq!(names(&plan(&ordered, offers())), ["a", "l"]);
    let any_of = Resources {
        alternatives: Alternatives::AnyOf(both),
        ..Resources::default()
    };
    assert_eq!(names(&plan(&any_of, offers())), ["l", "a"]);
}

#[test]
fn the_way_of_the_input_counts() {
    let task = Task {
        inputs: Some(("s3://bucket".to_owned(), 100.0)),
        ..Task::builder().build().expect("empty")
    };
    let near = Offer {
        provider: "aws".into(),
        ..offer("near", None, 2.0)
    };
    let plan = Plan::for_task(&task, vec![offer("far", None, 0.5), near]);
    assert_eq!(names(&plan), ["near", "far"]);
    assert!(
        plan.to_string().contains("+ 9.00 USD to bring the input"),
        "{plan}"
    );
}

#[test]
fn a_name_that_nothing_has_is_answered_with_what_is_near() {
    let resources = Resources {
        accelerators: Accelerators::AnyOf(vec![one("A10")]),
        ..Resources::default()
    };
    let plan = plan(&resources, vec![offer("g", Some("A10G"), 1.0)]);
    assert_eq!(plan.hints, ["nothing is called A10; did you mean A10G?"]);
}

#[test]
fn the_ceiling_is_per_node_and_hour() {
    let resources = Resources {
        max_hourly_cost_usd: Some(1.0),
        ..Resources::default()
    };
    let plan = plan(
        &resources,
        vec![offer("c", None, 0.9), offer("d", None, 1.1)],
    );
    assert_eq!(names(&plan), ["c"]);
    assert_eq!(
        plan.skipped[0].reason,
        "costs 1.10 USD/h, the task allows 1.00"
    );
}

#[test]
fn the_table_groups_what_was_skipped_for_one_reason() {
    let resources = Resources {
        cpus: Amount::parse("8+"),
        ..Resources::default()
    };
    let plan = plan(
        &resources,
        vec![offer("c", None, 0.1), offer("d", None, 0.2)],
    );
    assert_eq!(
        plan.to_string(),
        "    skipped fake c in here and 1 more: has 4 cpus, the task asks for 8+\n"
    );
}

#[test]
fn a_disk_that_is_too_small_is_passed_over() {
    let task = Task::from_yaml("resources: {disk_size: 100}\n", &EnvOverrides::new());
    let resources = task.expect("task").resources;
    let with = |disk_gib: Option<f64>| Offer {
        disk_gib,
        ..offer("m", None, 1.0)
    };
    let plan = plan(
        &resources,
        vec![with(Some(40.0)), with(Some(400.0)), with(None)],
    );
    assert_eq!(plan.candidates.len(), 2, "enough, and made to order");
    assert_eq!(
        plan.skipped[0].reason,
        "has 40 GiB of free disk, the task asks for 100"
    );
}
