/** What a page remembers of many runs: a Map of the latest, so that one that stays open for days does not grow. */

export class Recent extends Map {
  most = 1000;

  set(key, value) {
    this.delete(key); // it goes to the end
    super.set(key, value);
    if (this.size > this.most) this.delete(this.keys().next().value);
    return this;
  }
}
