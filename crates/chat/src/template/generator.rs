//! Filters that give a generator in Jinja2: read once, always true, without
//! length, and nothing that JSON could hold.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use minijinja::value::{Enumerator, Kwargs, Object, ObjectRepr, Rest, ValueOrKwargs};
use minijinja::{Environment, Error, State, Value, filters};

pub(super) fn add_filters(environment: &mut Environment<'static>) {
    environment.add_filter("map", map);
    environment.add_filter("select", select);
    environment.add_filter("reject", reject);
    environment.add_filter("selectattr", selectattr);
    environment.add_filter("rejectattr", rejectattr);
    environment.add_filter("unique", unique);
}

type Args = Rest<ValueOrKwargs>;
type Name<'a> = std::borrow::Cow<'a, str>;

fn map(state: &mut State<'_, '_>, value: Value, args: Args) -> Result<Value, Error> {
    filters::map(state, value, args).map(generator)
}

fn select(
    state: &mut State<'_, '_>,
    value: Value,
    test: Option<Name<'_>>,
    args: Args,
) -> Result<Value, Error> {
    filters::select(state, value, test, args).map(generator)
}

fn reject(
    state: &mut State<'_, '_>,
    value: Value,
    test: Option<Name<'_>>,
    args: Args,
) -> Result<Value, Error> {
    filters::reject(state, value, test, args).map(generator)
}

fn selectattr(
    state: &mut State<'_, '_>,
    value: Value,
    attribute: Name<'_>,
    test: Option<Name<'_>>,
    args: Args,
) -> Result<Value, Error> {
    filters::selectattr(state, value, attribute, test, args).map(generator)
}

fn rejectattr(
    state: &mut State<'_, '_>,
    value: Value,
    attribute: Name<'_>,
    test: Option<Name<'_>>,
    args: Args,
) -> Result<Value, Error> {
    filters::rejectattr(state, value, attribute, test, args).map(generator)
}

fn unique(state: &State<'_, '_>, values: Value, kwargs: Kwargs) -> Result<Value, Error> {
    let list = filters::unique(state, values, kwargs)?;
    Ok(generator(list.try_iter()?.collect()))
}

fn generator(items: Vec<Value>) -> Value {
    Value::from_object(Generator(Mutex::new(items.into_iter())))
}

/// Items that every reader takes from the same place.
struct Generator(Mutex<std::vec::IntoIter<Value>>);

impl Generator {
    fn with<T>(&self, read: impl FnOnce(&mut std::vec::IntoIter<Value>) -> T) -> T {
        read(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl fmt::Debug for Generator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<generator object>")
    }
}

impl Object for Generator {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Iterable
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Iter(Box::new(Items(Arc::clone(self))))
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        None
    }

    fn is_true(self: &Arc<Self>) -> bool {
        true
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

struct Items(Arc<Generator>);

impl Iterator for Items {
    type Item = Value;

    fn next(&mut self) -> Option<Value> {
        self.0.with(Iterator::next)
    }

    /// Exact, for `loop.length`.
    fn size_hint(&self) -> (usize, Option<usize>) {
        self.0.with(|items| items.size_hint())
    }
}
