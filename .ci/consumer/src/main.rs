//! Takes Updraft as a dependency, as its README says.

use updraft_provision::{EnvOverrides, Task};

fn main() {
    let task = Task::from_yaml("run: echo hello", &EnvOverrides::new());
    println!("{:?}", task.map(|task| task.run));
    println!("{:?}", updraft::store::Store::memory());
}
