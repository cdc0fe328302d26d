/** What a page remembers of many runs: a Map of the latest, so that one that stays open for days does not grow. */

const MOST = 1000;

export class Recent extends Map {
  set(key, value) {
    this.delete(key); // it goes to the end
    super.set(key, value);
    if (this.size > MOST) this.delete(this.keys().next().value);
    return this;
  }
}
