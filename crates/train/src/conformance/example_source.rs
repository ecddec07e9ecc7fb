//! What every [`ExampleSource`] promises.

use updraft_chat::Example;

use crate::ExampleSource;

/// Makes one test of each promise. The expression is evaluated for each and
/// must give a source of at least two examples.
///
/// ```
/// # use updraft_train::MemorySource;
/// mod memory_source {
///     updraft_train::example_source_tests!(super::small_source());
/// }
/// # fn small_source() -> MemorySource { unreachable!() }
/// ```
#[macro_export]
macro_rules! example_source_tests {
    ($source:expr) => {
        $crate::example_source_tests!(@each $source;
            the_plan_says_what_the_stream_yields
            an_epoch_holds_each_row_once
            a_stream_opened_later_is_the_tail_of_the_whole
            epochs_differ_only_in_order
            reading_twice_reads_the_same
            opening_at_the_end_yields_nothing
        );
    };
    (@each $source:expr; $($promise:ident)+) => {
        $(
            #[test]
            fn $promise() {
                $crate::conformance::example_source::$promise(&$source);
            }
        )+
    };
}

fn read(source: &dyn ExampleSource, epoch: u64, index: u64) -> Vec<Example> {
    let stream = source.open(epoch, index).expect("the source opens");
    stream
        .collect::<crate::Result<_>>()
        .expect("the source reads")
}

/// Lengths and trained tokens of the plan are those of the examples.
pub fn the_plan_says_what_the_stream_yields(source: &dyn ExampleSource) {
    let plan = source.plan();
    assert_eq!(plan.lengths.len(), plan.trained_tokens.len());
    assert!(
        plan.lengths.len() >= 2,
        "the suite needs at least two examples"
    );
    let examples = read(source, 0, 0);
    assert_eq!(examples.len(), plan.lengths.len());
    for (index, example) in examples.iter().enumerate() {
        let row = source.row(0, index as u64) as usize;
        assert_eq!(
            example.input_ids.len(),
            plan.lengths[row] as usize,
            "length of row {row}"
        );
        assert_eq!(
            example.trained_tokens(),
            plan.trained_tokens[row],
            "trained tokens of row {row}"
        );
    }
}

/// `row` is a permutation in every epoch.
pub fn an_epoch_holds_each_row_once(source: &dyn ExampleSource) {
    let len = source.plan().lengths.len() as u64;
    for epoch in 0..3 {
        let mut rows: Vec<u64> = (0..len).map(|index| source.row(epoch, index)).collect();
        rows.sort_unstable();
        assert_eq!(rows, (0..len).collect::<Vec<_>>(), "epoch {epoch}");
    }
}

/// Opening at an index skips exactly what comes before it.
pub fn a_stream_opened_later_is_the_tail_of_the_whole(source: &dyn ExampleSource) {
    for epoch in 0..2 {
        let whole = read(source, epoch, 0);
        for index in [1, whole.len() / 2, whole.len() - 1] {
            assert_eq!(
                read(source, epoch, index as u64),
                whole[index..],
                "epoch {epoch} from {index}"
            );
        }
    }
}

/// Each storage row is the same example in every epoch.
pub fn epochs_differ_only_in_order(source: &dyn ExampleSource) {
    let by_row = |epoch: u64| {
        let mut examples: Vec<(u64, Example)> = read(source, epoch, 0)
            .into_iter()
            .enumerate()
            .map(|(index, example)| (source.row(epoch, index as u64), example))
            .collect();
        examples.sort_by_key(|(row, _)| *row);
        examples
    };
    assert_eq!(by_row(0), by_row(1));
}

/// Two streams of the same epoch are equal.
pub fn reading_twice_reads_the_same(source: &dyn ExampleSource) {
    assert_eq!(read(source, 1, 0), read(source, 1, 0));
}

/// The end of an epoch is a place one can open at.
pub fn opening_at_the_end_yields_nothing(source: &dyn ExampleSource) {
    let len = source.plan().lengths.len() as u64;
    assert!(read(source, 0, len).is_empty());
}
