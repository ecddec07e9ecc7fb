//! What every [`Provider`] and [`HostTransport`](crate::HostTransport) promises, as tests.
//!
//! A provider's tests contain one line, with an expression that makes it and a guard:
//! `provider_conformance_tests!((MyProvider::new(), ()));`

pub mod capabilities;
mod deaf;
pub mod lifecycle;
pub mod transport;
mod trap;

pub use deaf::Deaf;
pub use trap::{Kill, Manner, Trap};

use crate::provider::{CreateRequest, Lease, Provider};

/// A request for the provider's cheapest offer.
///
/// # Panics
/// If the provider has no offers.
pub async fn smallest(provider: &dyn Provider, token: &str) -> CreateRequest {
    let offers = provider.offers().await.expect("offers");
    let cheapest = offers
        .into_iter()
        .min_by(|a, b| a.usd_per_hour.total_cmp(&b.usd_per_hour));
    CreateRequest {
        token: token.to_owned(),
        cluster: format!("cluster-{token}"),
        offer: cheapest.expect("at least one offer"),
        lease: Lease::default(),
        labels: [("team".to_owned(), "it's ours".to_owned())].into(),
        disk_size_gib: None,
    }
}

/// Makes one `#[tokio::test]` of each promise of [`Provider`].
///
/// The argument is an expression that makes a fresh provider and a guard, such as a temporary
/// folder, that lives as long as the test. After `else_return,` it is an `Option` of them, and `None`
/// where the provider cannot be had.
#[macro_export]
macro_rules! provider_conformance_tests {
    (else_return, $make:expr) => {
        $crate::__conformance!($make, lifecycle:
            offers_name_their_provider,
            created_instances_are_listed,
            create_is_idempotent_in_its_token,
            labels_are_kept,
            describe_knows_what_was_created,
            describe_of_an_absent_instance_is_typed,
            terminate_removes_from_the_list,
            terminate_is_idempotent,
            terminate_of_an_absent_instance_succeeds,
            stopped_instances_are_listed_and_start_again,
        );
        $crate::__conformance!($make, capabilities:
            a_port_has_one_address,
            a_deadline_is_set_moved_and_taken_away,
            what_the_owner_ended_was_not_preempted,
        );
    };
    ($make:expr) => {
        $crate::provider_conformance_tests!(else_return, Some($make));
    };
}

/// Makes one `#[tokio::test]` of each promise of [`HostTransport`](crate::HostTransport); the argument
/// is as that of [`provider_conformance_tests`].
#[macro_export]
macro_rules! transport_conformance_tests {
    (else_return, $make:expr) => {
        $crate::__conformance!($make, transport:
            lines_arrive_in_order_and_none_is_lost,
            the_exit_code_is_reported,
            the_environment_and_workdir_are_set,
            ending_a_process_ends_its_children,
            files_arrive_whole_and_come_back,
            a_forward_leads_to_the_nodes_port,
        );
    };
    ($make:expr) => {
        $crate::transport_conformance_tests!(else_return, Some($make));
    };
}

/// One test per promise; the guard is dropped after the promise has been checked.
#[doc(hidden)]
#[macro_export]
macro_rules! __conformance {
    ($make:expr, $suite:ident: $($promise:ident,)*) => {
        $(
            #[tokio::test]
            async fn $promise() {
                let Some((subject, _guard)) = $make else {
                    return; // whoever makes it has said why not
                };
                $crate::conformance::$suite::$promise(&subject).await;
            }
        )*
    };
}
